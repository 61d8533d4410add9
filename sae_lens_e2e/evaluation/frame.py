"""Evaluations of SAEs as tidy tables."""

from collections.abc import Mapping
from dataclasses import asdict

import pandas as pd

from sae_lens_e2e.evaluation.result import Evaluation
from sae_lens_e2e.evaluation.together import TogetherEvaluation

_NESTED = ("sparsity", "firing", "layers", "downstream_mse")
_AT_HOOK = ("mse", "explained_variance", "l2_ratio", "cosine")


def evaluation_frame(results: Mapping[str, Evaluation]) -> pd.DataFrame:
    """One row an SAE: what it is, what it costs and how its features fire, in columns named as `Evaluation`'s fields.

    `sae`, its name in `results`, comes first. Each sparsity coefficient has a column of its own, and the last columns, `mse`,
    `explained_variance`, `l2_ratio` and `cosine`, are those at the SAE's hook.
    """
    return pd.DataFrame([_row(name, result) for name, result in results.items()])


def layers_frame(results: Mapping[str, Evaluation]) -> pd.DataFrame:
    """One row an SAE and hook: the columns `sae`, `hook`, `layer` and those of `LayerEvaluation`.

    `layer` counts the hooks in their order, from 0 at the SAE's own.
    """
    return pd.DataFrame(
        [
            {"sae": name, "hook": hook, "layer": number, **asdict(layer)}
            for name, result in results.items()
            for number, (hook, layer) in enumerate(result.layers.items())
        ]
    )


def firing_frame(results: Mapping[str, Evaluation]) -> pd.DataFrame:
    """One row an SAE and bin of its firing-frequency histogram: `sae`, `log10_low`, `log10_high` and `n_features`.

    The edges are log10 of a fraction of tokens. Features that never fired are in each SAE's first bin, from -inf.
    """
    rows = []
    for name, result in results.items():
        edges = (float("-inf"), *result.firing.log10_edges)
        counts = (result.firing.n_never, *result.firing.counts)
        rows += [
            {"sae": name, "log10_low": low, "log10_high": high, "n_features": count}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
    return pd.DataFrame(rows)


def together_frame(results: Mapping[str, TogetherEvaluation]) -> pd.DataFrame:
    """One row a group of SAEs, by name in `results`, and set of them that was spliced in at once.

    Columns: `group`; `spliced`, "alone" or "together"; of the set `n_saes`, and the last one's name, `sae`, with its `depth`, from 1 on,
    `hook_name`, `hook_name_out` (a transcoder's) and `hook_head_index`; `ce_loss`, `ce_loss_increase` over the model without any, `kl` (nats per token) and `top1_agreement`.
    """
    return pd.DataFrame(
        [
            {
                "group": group,
                "spliced": spliced,
                "n_saes": len(one.saes),
                "sae": one.saes[-1],
                "depth": list(found.hook_names).index(one.saes[-1]) + 1,
                "hook_name": found.hook_names[one.saes[-1]],
                "hook_name_out": found.hook_names_out.get(one.saes[-1]),
                "hook_head_index": found.hook_head_indices[one.saes[-1]],
                "ce_loss": one.ce_loss,
                "ce_loss_increase": one.ce_loss - found.ce_loss_without_saes,
                "kl": one.kl,
                "top1_agreement": one.top1_agreement,
            }
            for group, found in results.items()
            for spliced, sets in (("alone", found.alone), ("together", found.together))
            for one in sets
        ]
    )


def _row(name: str, result: Evaluation) -> dict[str, object]:
    figures = {key: value for key, value in result.to_dict().items() if key not in _NESTED}
    return {"sae": name, **figures, **result.sparsity, **{key: getattr(result.at_hook, key) for key in _AT_HOOK}}
