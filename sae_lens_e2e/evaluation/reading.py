"""Reading a dataset once, for whoever measures something on each of its batches."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.evaluation.options import PassOptions
from sae_lens_e2e.evaluation.running import check_evaluable, inference
from sae_lens_e2e.evaluation.tokens import Setting, TokenBatches
from sae_lens_e2e.splice import SplicedModel, Where

Add = Callable[[Int[Tensor, "prompts pos"], Where], None]
"""Measures one batch: tokens, on the CPU, and which of them count, of which there is at least one."""


@dataclass(frozen=True)
class Read:
    """How many tokens were read, and how many of them were measured."""

    n_tokens: int
    n_tokens_measured: int


def settings_of(
    saes: Mapping[str, SAE[Any]], model: HookedRootModule, options: PassOptions
) -> tuple[Setting, dict[str, Setting]]:
    """How the SAEs' tokens are read, and each one's setting; they may differ in where they sit.

    Raises ValueError for SAEs that cannot be evaluated, or not on the same tokens.
    """
    if not saes:
        raise ValueError("saes is empty; name at least one SAE")
    for name, sae in saes.items():
        check_evaluable(name, sae)
    settings = {name: Setting.of(sae, model, options.context_size) for name, sae in saes.items()}
    (first, setting), *others = settings.items()
    for name, other in others:
        setting.check_same(other, (first, name))
    return setting, settings


def read_through(
    batches: TokenBatches,
    model: SplicedModel,
    saes: Mapping[str, SAE[Any]],
    setting: Setting,
    options: PassOptions,
    add: Add,
) -> Read:
    """Give every batch to `add`, the model and SAEs ready to be run.

    Raises ValueError if the options do not allow one batch, for a token that the model does not know, or if there was none to
    measure.
    """
    tokens_per_batch = options.batch_size_prompts * setting.context_size
    limit = options.limit(batches.n_batches, setting.context_size)
    n_tokens = n_measured = n_labels = 0
    with ExitStack() as stack:
        for context in (model.running(), *map(inference, saes.values())):
            stack.enter_context(context)
        bar = tqdm(
            desc="Evaluating",
            total=None if limit is None else limit * tokens_per_batch,
            unit="tok",
            unit_scale=True,
            leave=False,
            disable=not options.verbose,
        )
        stack.enter_context(bar)
        for number, tokens in enumerate(batches, start=1):
            check_vocabulary(tokens, model)
            where = setting.positions.of(tokens)
            if where.n:
                add(tokens, where)
            n_tokens, n_measured, n_labels = n_tokens + tokens.numel(), n_measured + where.n, n_labels + where.n_labels
            bar.update(tokens.numel())
            if number == limit:
                break
    if n_labels == 0:
        raise ValueError(
            "exclude_special_tokens leaves no token of the dataset to measure; exclude fewer, or give more data"
        )
    return Read(n_tokens, n_measured)


def check_vocabulary(tokens: Int[Tensor, "prompts pos"], model: SplicedModel) -> None:
    """Raise ValueError for a token that the model cannot read, or not predict."""
    (least, largest), predicted = (int(token) for token in tokens.aminmax()), model.unembedding.d_vocab
    known = model.d_vocab_in or predicted
    if least < 0 or largest >= known:
        raise ValueError(
            f"the dataset has token {least if least < 0 else largest} and the model knows {known}; tokenise it with the model's own tokenizer"
        )
    if largest >= predicted:
        raise ValueError(
            f"the model reads {known} tokens and predicts {predicted}, and the dataset has token {largest}, which it cannot predict: "
            "there is no next-token loss to measure; evaluate on a model that predicts every token"
        )
