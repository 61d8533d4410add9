"""Which tokens an SAE is evaluated on: where it sits, from its metadata, and whole prompts from a dataset."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from jaxtyping import Int
from sae_lens import SAE
from sae_lens.config import HfDataset
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor
from transformer_lens.HookedRootModule import HookedRootModule
from typing_extensions import override

from sae_lens_e2e.architectures.transcoder import is_transcoder
from sae_lens_e2e.columns import column_of, text_of, tokens_of
from sae_lens_e2e.splice import Positions, Site, excluded

_PLACE = ("hook_name", "hook_head_index", "hook_name_out")


@dataclass(frozen=True)
class Setting:
    """Where an SAE sits, and how its tokens are read: what SAEs must have in common to share a pass over the data."""

    hook_name: str
    hook_head_index: int | None
    context_size: int
    seqpos_slice: tuple[int | None, ...]
    exclude_special_tokens: tuple[int, ...]
    prepend_bos: bool | None
    sequence_separator_token: int | str | None
    disable_concat_sequences: bool
    use_chat_formatting: bool = False
    hook_name_out: str | None = None
    """The hook that a transcoder writes."""

    @classmethod
    def of(cls, sae: SAE[Any], model: HookedRootModule, context_size: int | None = None) -> "Setting":
        """From the SAE's metadata. Raises ValueError for what is missing there, naming it."""
        metadata = sae.cfg.metadata
        given = {"hook_name": metadata.hook_name, "context_size": context_size or metadata.context_size}
        if is_transcoder(sae.cfg):
            given["hook_name_out"] = metadata.hook_name_out
        for name, value in given.items():
            if value is None:
                raise ValueError(f"sae.cfg.metadata.{name} is not set; set it to what the SAE was trained with")
        return cls(
            **given,
            hook_head_index=metadata.hook_head_index,
            seqpos_slice=tuple(metadata.seqpos_slice or (None,)),
            exclude_special_tokens=excluded_tokens(metadata.exclude_special_tokens, model),
            prepend_bos=metadata.prepend_bos,
            sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
            disable_concat_sequences=bool(metadata.disable_concat_sequences),
            use_chat_formatting=bool(metadata.use_chat_formatting),
        )

    @property
    def site(self) -> Site:
        """Where the SAE is spliced in."""
        return Site.between(self.hook_name, self.hook_name_out, self.hook_head_index)

    @property
    def positions(self) -> Positions:
        """Which tokens are measured."""
        return Positions(self.seqpos_slice, self.exclude_special_tokens)

    def check_same(self, other: "Setting", names: tuple[str, str], place: bool = False) -> None:
        """Raise ValueError, naming the field, if another SAE's tokens are read differently, or with `place` if it sits elsewhere."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs and (place or field.name not in _PLACE):
                raise ValueError(
                    f"saes {names[0]!r} and {names[1]!r} differ in {field.name} ({mine!r} and {theirs!r}), so they cannot share "
                    "a pass; evaluate them separately"
                )

    def check(self, n_ctx: int | None) -> None:
        """Raise ValueError if the context does not fit the model, or no measured position predicts a next token."""
        if n_ctx is not None and self.context_size > n_ctx:
            raise ValueError(
                f"context_size={self.context_size} is longer than the model's, {n_ctx}; set it to {n_ctx} or less"
            )
        self.positions.check(self.context_size)


def token_batches(
    dataset: HfDataset, model: HookedRootModule, setting: Setting, batch_size_prompts: int
) -> "TokenBatches":
    """Whole batches of whole prompts, read and tokenised as SAELens does it.

    Raises ValueError, before the model is run, for a dataset that does not give one batch.
    """
    tokenised = _check_dataset(dataset, model, setting)
    n_batches = None
    if isinstance(dataset, Dataset):
        # SAELens sets the format of the dataset it is given, which may be the caller's.
        n_prompts, dataset = len(dataset), dataset.select(range(len(dataset)))
        n_batches = n_prompts // batch_size_prompts if tokenised else None
        if n_batches == 0:
            raise _too_short(f"{n_prompts} prompts", batch_size_prompts, setting.context_size)
    store = _Store(
        model=model,
        dataset=dataset,
        streaming=False,
        hook_name=setting.hook_name,
        hook_head_index=setting.hook_head_index,
        context_size=setting.context_size,
        # Nobody asks this store for activations.
        d_in=0,
        n_batches_in_buffer=1,
        # 0 keeps SAELens from warning that the dataset is too short to train on.
        total_training_tokens=0,
        store_batch_size_prompts=batch_size_prompts,
        train_batch_size_tokens=batch_size_prompts * setting.context_size,
        prepend_bos=bool(setting.prepend_bos),
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        disable_concat_sequences=setting.disable_concat_sequences,
        sequence_separator_token=setting.sequence_separator_token,  # pyright: ignore[reportArgumentType]
        use_chat_formatting=setting.use_chat_formatting,
    )
    batches = TokenBatches(store, batch_size_prompts, n_batches)
    if batches.upcoming is None:
        raise _too_short("fewer prompts", batch_size_prompts, setting.context_size)
    return batches


class _Store(ActivationsStore):
    """SAELens' store, which says of a row that cannot be read which it is."""

    @override
    def _iterate_raw_dataset(self) -> Generator[Any, None, None]:
        for row in super()._iterate_raw_dataset():
            if self.is_dataset_tokenized:
                yield tokens_of(row, self.n_dataset_processed, self.context_size).tolist()
            else:
                yield text_of(row, self.n_dataset_processed, self.use_chat_formatting)


class TokenBatches(Iterator[Tensor]):
    """One pass over the dataset in batches (prompts, context_size), on the CPU, where tokens are counted.

    What remains at the end and fills none is left out.
    """

    def __init__(self, store: ActivationsStore, batch_size_prompts: int, n_batches: int | None):
        self.store, self.batch_size_prompts = store, batch_size_prompts
        self.n_batches = n_batches
        """None if it is not known before the dataset has been read."""
        self.upcoming = self._read()

    def __next__(self) -> Int[Tensor, "prompts pos"]:
        batch, self.upcoming = self.upcoming, None
        if batch is None:
            batch = self._read()
        if batch is None:
            raise StopIteration
        return batch

    def _read(self) -> Tensor | None:
        try:
            return self.store.get_batch_tokens(
                self.batch_size_prompts, raise_at_epoch_end=True, move_to_model_device=False
            )
        except StopIteration:
            return None


def excluded_tokens(setting: bool | list[int] | None, model: HookedRootModule) -> tuple[int, ...]:
    """The ids that an SAE's `exclude_special_tokens` stands for. Raises ValueError if that takes a tokenizer and there is none."""
    if setting is True:
        tokenizer: Any = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "exclude_special_tokens=True needs the model's tokenizer, and it has none; give the SAE's metadata token ids"
            )
        return excluded(get_special_token_ids(tokenizer))
    return excluded(setting or None)


def _check_dataset(dataset: HfDataset, model: HookedRootModule, setting: Setting) -> bool:
    """Whether the dataset is tokenised, from its first row. Raises ValueError for one that cannot be read."""
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise ValueError(f"the dataset has splits ({', '.join(map(str, dataset))}); give one of them")
    row: Any = next(iter(dataset), None)
    if row is None:
        raise ValueError("the dataset is empty; give it at least one batch of prompts")
    column = column_of(row, setting.use_chat_formatting)
    if column.is_tokens:
        if len(row[column.name]) < setting.context_size:
            raise ValueError(
                f"the dataset's rows have {len(row[column.name])} tokens, fewer than context_size={setting.context_size}; "
                "tokenise it into longer rows, or evaluate with a shorter context_size"
            )
        return True
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("the dataset holds text and the model has no tokenizer; tokenise it, or give the model one")
    if setting.prepend_bos is None:
        raise ValueError("sae.cfg.metadata.prepend_bos is not set; set it to what the SAE was trained with")
    return False


def _too_short(found: str, batch_size_prompts: int, context_size: int) -> ValueError:
    return ValueError(
        f"the dataset has {found}, too few for batch_size_prompts={batch_size_prompts} of {context_size} tokens; lower it, or "
        "give more data"
    )
