"""What several SAEs cost the language model when they are spliced in at once, beside what each costs alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE
from sae_lens.config import HfDataset
from torch import Tensor
from transformer_lens.HookedRootModule import HookedRootModule

from sae_lens_e2e.architectures.transcoder import is_transcoder, widths_of
from sae_lens_e2e.evaluation.next_token import compare_next_tokens
from sae_lens_e2e.evaluation.options import PassOptions
from sae_lens_e2e.evaluation.reading import read_through, settings_of
from sae_lens_e2e.evaluation.running import SplicedSAE
from sae_lens_e2e.evaluation.sums import TokenSums
from sae_lens_e2e.evaluation.tokens import token_batches
from sae_lens_e2e.splice import Site, SplicedModel, Where, check_sites


@dataclass(frozen=True)
class SplicedIn:
    """The language model with some SAEs spliced in, over the measured tokens."""

    saes: tuple[str, ...]
    """Their names, in order of depth."""
    ce_loss: float
    """In nats per token."""
    kl: float
    """KL(without any ‖ with these), in nats per token."""
    top1_agreement: float
    """The fraction of tokens after which the likeliest token is the same without any and with these."""


@dataclass(frozen=True, kw_only=True)
class TogetherEvaluation:
    """What SAEs cost their language model on held-out tokens, each alone, and in order of depth one more at a time.

    A later SAE is given what the earlier ones have left of the stream. Which tokens are measured is as in `Evaluation`.
    """

    model_name: str | None
    hook_names: dict[str, str]
    """By SAE, in order of depth."""
    hook_head_indices: dict[str, int | None]
    hook_names_out: dict[str, str] = field(default_factory=dict)
    """Of the transcoders, what each writes."""
    context_size: int
    n_tokens: int
    n_tokens_measured: int
    ce_loss_without_saes: float
    alone: tuple[SplicedIn, ...]
    """Each SAE by itself."""
    together: tuple[SplicedIn, ...]
    """The first, the first two, and so on; the last is all of them."""

    @property
    def ce_loss_increase(self) -> float:
        """Nats of cross-entropy that all SAEs at once cost."""
        return self.together[-1].ce_loss - self.ce_loss_without_saes

    @property
    def ce_loss_increase_alone(self) -> float:
        """The sum of what each costs alone: what all would cost if their errors did not add up in the stream."""
        return sum(one.ce_loss - self.ce_loss_without_saes for one in self.alone)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures, what is derived from the others included."""
        derived = {name: getattr(self, name) for name in ("ce_loss_increase", "ce_loss_increase_alone")}
        return asdict(self) | derived

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> "TogetherEvaluation":
        """The result that `to_dict` was called on, before or after JSON. Raises ValueError if figures are missing."""
        # Those of before there were transcoders do not have it.
        figures = {"hook_names_out": {}, **figures}
        names = [f.name for f in fields(cls)]
        if missing := [name for name in names if name not in figures]:
            raise ValueError(
                f"no stored evaluation of SAEs together: it has no {', '.join(missing)}; evaluate them again"
            )
        values: dict[str, Any] = {name: figures[name] for name in names}
        for name in ("alone", "together"):
            values[name] = tuple(SplicedIn(**{**one, "saes": tuple(one["saes"])}) for one in values[name])
        return cls(**values)


@torch.no_grad()
def evaluate_together(
    saes: Mapping[str, SAE[Any]], model: HookedRootModule, dataset: HfDataset, **options: Any
) -> TogetherEvaluation:
    """What SAEs at several hooks, or heads of one, cost the language model: each alone, and 1, 2, ... all of them at once.

    saes: by name, each in a place of its own, and all trained on tokens that are read the same way.
    dataset: as for `evaluate`.
    options: fields of `PassOptions`: batch_size_prompts, n_batches, max_tokens, context_size, model_kwargs, verbose.

    Each batch takes one clean pass, and two spliced ones an SAE, from its hook or the first SAE's on. Raises ValueError before any
    long work for what `evaluate_many` raises it for, and for two SAEs that write in the same place.
    """
    chosen = PassOptions(**options)
    setting, settings = settings_of(saes, model, chosen)
    spliced = SplicedModel(model, chosen.model_kwargs)
    setting.check(spliced.n_ctx)
    sites = {name: one.site for name, one in settings.items()}
    check_sites(spliced, sites, {name: widths_of(sae.cfg) for name, sae in saes.items()})
    together = _TogetherPass(spliced, saes, sites)
    batches = token_batches(dataset, model, setting, chosen.batch_size_prompts)
    read = read_through(batches, spliced, saes, setting, chosen, together.add)
    return TogetherEvaluation(
        model_name=next(iter(saes.values())).cfg.metadata.model_name,
        hook_names={name: settings[name].hook_name for name in together.names},
        hook_head_indices={name: settings[name].hook_head_index for name in together.names},
        hook_names_out={name: out for name in together.names if (out := settings[name].hook_name_out) is not None},
        context_size=setting.context_size,
        n_tokens=read.n_tokens,
        n_tokens_measured=read.n_tokens_measured,
        ce_loss_without_saes=together.clean.mean("ce"),
        alone=tuple(together.spliced_in((name,)) for name in together.names),
        together=tuple(together.spliced_in(together.names[:n]) for n in range(1, len(saes) + 1)),
    )


def evaluate_replacement(
    transcoders: Mapping[str, SAE[Any]], model: HookedRootModule, dataset: HfDataset, **options: Any
) -> TogetherEvaluation:
    """What the language model is worth with transcoders in the place of its parts: `evaluate_together`, for transcoders only.

    `ce_loss_increase` is what all of them at once cost, `ce_loss_increase_alone` the sum over each by itself. Raises ValueError, besides
    what `evaluate_together` raises it for, for an SAE, which takes the place of nothing.
    """
    for name, sae in transcoders.items():
        if not is_transcoder(sae.cfg):
            raise ValueError(
                f"{name}: a {sae.cfg.architecture()} stands for what it reads and replaces no part of the model; give transcoders, or use "
                "evaluate_together"
            )
    return evaluate_together(transcoders, model, dataset, **options)


class _TogetherPass:
    """The sums of every set of SAEs that is spliced in at once; all share the clean pass of a batch."""

    def __init__(self, model: SplicedModel, saes: Mapping[str, SAE[Any]], sites: Mapping[str, Site]):
        self.model, self.saes, self.sites = model, saes, sites
        names = {site: name for name, site in sites.items()}
        self.names = tuple(names[site] for site in model.in_order(names))
        """In order of depth."""
        sets = [*((name,) for name in self.names), *(self.names[:n] for n in range(1, len(names) + 1))]
        self.clean = TokenSums()
        self.spliced = {of_set: TokenSums() for of_set in sets}

    def add(self, tokens: Int[Tensor, "batch pos"], where: Where) -> None:
        """Run one batch: the model as it is, and with each set of SAEs."""
        clean = self.model.clean(tokens.to(self.model.device), self.sites.values())
        assert clean.final is not None
        finals = []
        for of_set in self.spliced:
            replace = {self.sites[name]: SplicedSAE(self.saes[name], self.sites[name], where) for name in of_set}
            spliced = self.model.spliced(clean, where, replace, reading=Where.everywhere(tokens))
            assert spliced.final is not None
            finals.append(where.take(spliced.final))
        of_clean, of_changed = compare_next_tokens(
            self.model.unembedding, where.take(clean.final), finals, where.labels(tokens)
        )
        self.clean.add(of_clean)
        for sums, measures in zip(self.spliced.values(), of_changed, strict=True):
            sums.add(measures)

    def spliced_in(self, of_set: tuple[str, ...]) -> SplicedIn:
        """The figures of one set of SAEs."""
        sums = self.spliced[of_set]
        return SplicedIn(of_set, sums.mean("ce"), sums.mean("kl"), sums.mean("top1_agreement"))
