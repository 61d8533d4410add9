"""What SAEs are measured on together: one language model, one hook, the same tokens."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.architectures.transcoder import widths_of
from sae_lens_e2e.bench.fingerprint import fingerprint, fingerprint_of_module
from sae_lens_e2e.bench.members import Member, Skipped
from sae_lens_e2e.errors import one_line
from sae_lens_e2e.evaluation.running import in_prompts, inference
from sae_lens_e2e.evaluation.tokens import Setting, token_batches
from sae_lens_e2e.loading import held_out_documents, load_model, model_settings
from sae_lens_e2e.splice import Site, SplicedModel, Where, check_sites


@dataclass(frozen=True, eq=False)
class Bench:
    """A language model, and the tokens that every measure reads, in whole batches."""

    model: HookedRootModule
    model_name: str
    dataset_name: str
    setting: Setting
    tokens: Int[Tensor, "prompts pos"]
    batch_size_prompts: int
    identity: str
    """A digest of the model's weights and of the tokens."""
    caveat: str | None = None
    """What keeps one from being sure that no SAE was trained on the tokens."""

    @property
    def short_model_name(self) -> str:
        """The model's name without the folders that it lies in."""
        return "/".join(Path(self.model_name).parts[-2:])

    @property
    def n_tokens(self) -> int:
        """How many tokens a measure reads."""
        return self.tokens.numel()

    @cached_property
    def splice(self) -> SplicedModel:
        """The model, to be run clean or with SAEs in it."""
        return SplicedModel(self.model)

    @property
    def dataset(self) -> Dataset:
        """The tokens as a dataset, a row a prompt."""
        return Dataset.from_dict({"input_ids": self.tokens.numpy()})


def set_up(
    members: Sequence[Member],
    model: str | HookedRootModule | None,
    dataset: str | Dataset | None,
    max_tokens: int,
    batch_size_prompts: int,
    device: str,
    trust_remote_code: bool = False,
) -> tuple[Bench, list[Member], list[Skipped]]:
    """Load the model and data that SAEs are to be measured on, and say which SAEs do not fit.

    `model` and `dataset` are names, or the things themselves; left at None, they are what the SAEs' metadata name. Raises
    ValueError or OSError for what is not there, SAEs that read tokens differently, a dataset that is too short, or if
    no SAE fits.
    """
    metadata = members[0].sae.cfg.metadata
    model_name = model if isinstance(model, str) else metadata.model_name
    dataset_name = dataset if isinstance(dataset, str) else _dataset_name(members, given=dataset is not None)
    if not isinstance(model, HookedRootModule):
        model = load_model(device=device, **model_settings(metadata, model_name, trust_remote_code))
    setting = _setting(members, model)
    splice = SplicedModel(model)
    splice.check_hook(setting.hook_name)
    setting.check(splice.n_ctx)
    caveat = None
    if dataset is None or isinstance(dataset, str):
        dataset, caveat = held_out_documents({member.name: member.sae for member in members}, dataset_name)
    tokens = _tokens(dataset, model, setting, max_tokens, batch_size_prompts)
    kept, skipped = _fitting(members, splice, setting.site)
    identity = f"{fingerprint_of_module(model)}-{fingerprint({'tokens': tokens})}"
    batch_size = min(batch_size_prompts, len(tokens))
    bench = Bench(model, str(model_name), dataset_name, setting, tokens, batch_size, identity, caveat)
    return bench, kept, skipped


def features_by_batch(
    members: Sequence[Member], bench: Bench, description: str, verbose: bool = True
) -> Iterator[tuple[Where, Mapping[str, Float[Tensor, "batch pos d_sae"]]]]:
    """Every SAE's features of every batch by its name, and the tokens that count; the model is run no further than the hook."""
    splice, site = bench.splice, bench.setting.site
    with ExitStack() as stack:
        for context in (splice.running(), *(inference(one.sae) for one in members)):
            stack.enter_context(context)
        for tokens in tqdm(bench.tokens.split(bench.batch_size_prompts), description, leave=False, disable=not verbose):
            x = in_prompts(site, splice.clean(tokens.to(splice.device), [site], final=False).at[site.read])
            features = {one.name: one.sae.encode(x.to(one.sae.device)) for one in members}
            yield bench.setting.positions.of(tokens), features


def _dataset_name(members: Sequence[Member], given: bool) -> str:
    names = {str(member.sae.cfg.metadata.dataset_path) for member in members}
    if given:
        return "the dataset that was passed in"
    if names == {"None"}:
        raise ValueError("the SAEs' metadata name no dataset_path; say what to measure on with dataset= (--dataset)")
    if len(names) > 1:
        raise ValueError(f"the SAEs were trained on {', '.join(sorted(names))}; say what to measure on with dataset=")
    return names.pop()


def _setting(members: Sequence[Member], model: HookedRootModule) -> Setting:
    (first, setting), *others = ((member.name, Setting.of(member.sae, model)) for member in members)
    for name, other in others:
        setting.check_same(other, (first, name), place=True)
    return setting


def _tokens(
    documents: Dataset, model: HookedRootModule, setting: Setting, max_tokens: int, batch_size_prompts: int
) -> Int[Tensor, "prompts pos"]:
    """The first prompts of a dataset, as many whole batches as `max_tokens` allows."""
    if not isinstance(documents, Dataset):
        raise ValueError(f"dataset is a {type(documents).__name__}; give a datasets.Dataset, or a name")
    context_size = setting.context_size
    if max_tokens < context_size:
        raise ValueError(
            f"max_tokens={max_tokens} is less than a prompt of the SAEs' context_size={context_size}; raise it"
        )
    prompts = list(islice(token_batches(documents, model, setting, batch_size_prompts=1), max_tokens // context_size))
    if (shortest := min(prompt.shape[1] for prompt in prompts)) < context_size:
        raise ValueError(
            f"the dataset has a row of {shortest} tokens, fewer than the SAEs' context_size={context_size}"
        )
    left_over = len(prompts) % batch_size_prompts if len(prompts) > batch_size_prompts else 0
    return torch.cat(prompts[: len(prompts) - left_over])


def _fitting(members: Sequence[Member], splice: SplicedModel, site: Site) -> tuple[list[Member], list[Skipped]]:
    reasons = {member.name: _misfit(member, splice, site) for member in members}
    skipped = [Skipped(name, reason) for name, reason in reasons.items() if reason is not None]
    if len(skipped) == len(members):
        raise ValueError(f"no SAE fits the model; {skipped[0].name}: {skipped[0].reason}")
    return [member for member in members if reasons[member.name] is None], skipped


def _misfit(member: Member, splice: SplicedModel, site: Site) -> str | None:
    """Why an SAE does not fit the model, if it does not."""
    try:
        check_sites(splice, {member.name: site}, {member.name: widths_of(member.sae.cfg)})
    except ValueError as error:
        return one_line(error)
    return None
