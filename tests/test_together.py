"""Several SAEs at different hooks: each alone and all at once, against hooks written out; and no waiting for the device."""

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformer_lens import HookedTransformer

from sae_lens_e2e.columns import Column, column_of
from sae_lens_e2e.evaluation import (
    EvaluationOptions,
    TogetherEvaluation,
    evaluate,
    evaluate_many,
    evaluate_together,
    together_frame,
)
from sae_lens_e2e.evaluation.files import read_together, write_together
from sae_lens_e2e.evaluation.moved import MOVED
from tests.models import dataset_of, random_model, random_tokens
from tests.processes import run_stock

N_POS, D_VOCAB = 12, 61
TOKENS = random_tokens(8, N_POS, D_VOCAB)
HEAD, MLP, LAST = "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_pre"
# Not in order of depth.
PLACES: dict[str, tuple[str, int | None, int]] = {
    "last": (LAST, None, 16),
    "head": (HEAD, 2, 4),
    "mlp": (MLP, None, 16),
}
DEPTH = ("head", "mlp", "last")


def metadata(**fields: Any) -> SAEMetadata:
    return SAEMetadata(**{"context_size": N_POS, "prepend_bos": False, "model_name": "tiny"} | fields)


def make_sae(hook_name: str = LAST, head: int | None = None, d_in: int = 16, seed: int = 0, **fields: Any) -> SAE[Any]:
    """A random SAE that reconstructs badly but not absurdly."""
    torch.manual_seed(seed)
    about = metadata(hook_name=hook_name, hook_head_index=head, **fields)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=40, metadata=about))
    sae.W_dec.data.mul_(0.2)
    return sae


def three(**fields: Any) -> dict[str, SAE[Any]]:
    """SAEs in three places, two of them in one block, one on a head."""
    return {name: make_sae(*place, seed=i, **fields) for i, (name, place) in enumerate(PLACES.items())}


def sizes(**overrides: Any) -> dict[str, Any]:
    return {"batch_size_prompts": 4, "verbose": False, **overrides}


# Against hooks


def naive_log_probs(model: HookedTransformer, saes: dict[str, SAE[Any]], mask: Tensor) -> Tensor:
    """With every SAE's output in its place wherever the mask says, all in one forward pass."""

    def put_in(sae: SAE[Any], head: int | None) -> Any:
        def at_hook(activation: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            x = activation if head is None else activation[:, :, head]
            new = torch.where(mask[..., None], sae(x), x)
            if head is None:
                return new
            activation = activation.clone()
            activation[:, :, head] = new
            return activation

        return at_hook

    hooks: Any = [(PLACES[name][0], put_in(sae, PLACES[name][1])) for name, sae in saes.items()]
    with torch.no_grad():
        return model.run_with_hooks(TOKENS, fwd_hooks=hooks).double().log_softmax(-1)


@pytest.mark.parametrize(
    ("fields", "mask"),
    [
        ({}, torch.ones_like(TOKENS, dtype=torch.bool)),
        ({"exclude_special_tokens": [3, 4, 5]}, ~torch.isin(TOKENS, torch.tensor([3, 4, 5]))),
    ],
    ids=["all", "excluded"],
)
def test_alone_and_together_are_as_with_hooks(fields: dict[str, Any], mask: Tensor) -> None:
    model, saes = random_model(), three(**fields)
    found = evaluate_together(saes, model, dataset_of(TOKENS), **sizes())
    log_p = naive_log_probs(model, {}, mask)
    labels, known = TOKENS[:, 1:, None], mask[:, :-1]

    def ce(log_q: Tensor) -> float:
        return float(-log_q[:, :-1].gather(-1, labels)[..., 0][known].mean())

    assert tuple(found.hook_names) == DEPTH
    assert found.hook_names == {name: PLACES[name][0] for name in DEPTH}
    assert found.hook_head_indices == {"head": 2, "mlp": None, "last": None}
    assert (found.n_tokens, found.n_tokens_measured, found.model_name) == (96, int(mask.sum()), "tiny")
    assert found.ce_loss_without_saes == pytest.approx(ce(log_p), rel=1e-5)
    assert [one.saes for one in found.alone] == [("head",), ("mlp",), ("last",)]
    assert [one.saes for one in found.together] == [DEPTH[:1], DEPTH[:2], DEPTH]
    for one in (*found.alone, *found.together):
        log_q = naive_log_probs(model, {name: saes[name] for name in one.saes}, mask)
        assert one.ce_loss == pytest.approx(ce(log_q), rel=1e-5)
        assert one.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()), rel=1e-4)
        same = log_p.argmax(-1) == log_q.argmax(-1)
        assert one.top1_agreement == pytest.approx(float(same[mask].double().mean()))
    assert found.together[0] == found.alone[0]
    assert all(a.kl != b.kl for a, b in pairwise((*found.alone, *found.together[1:])))
    assert found.ce_loss_increase == found.together[-1].ce_loss - found.ce_loss_without_saes
    assert found.ce_loss_increase_alone == pytest.approx(
        sum(one.ce_loss for one in found.alone) - 3 * found.ce_loss_without_saes
    )


def test_two_heads_of_one_hook_and_any_batch_size() -> None:
    saes = {"one": make_sae(HEAD, 3, 4, seed=1), "other": make_sae(HEAD, 0, 4, seed=2)}
    found = evaluate_together(saes, random_model(), dataset_of(TOKENS), **sizes())
    assert list(found.hook_names) == ["other", "one"]
    assert len({one.kl for one in (*found.alone, *found.together)}) == 3
    again = evaluate_together(saes, random_model(), dataset_of(TOKENS), **sizes(batch_size_prompts=1))
    for a, b in zip(found.together, again.together, strict=True):
        assert (a.ce_loss, a.kl, a.top1_agreement) == pytest.approx((b.ce_loss, b.kl, b.top1_agreement), rel=1e-5)


def test_one_that_looks_back_reads_whole_prompts() -> None:
    sae_class, config_class = SAE_CLASS_REGISTRY["temporal"]
    torch.manual_seed(0)
    about = metadata(hook_name=LAST, exclude_special_tokens=[3, 4, 5])
    settings: dict[str, Any] = {"n_heads": 2, "bottleneck_factor": 8, "kval_topk": 6}
    temporal = sae_class(config_class(d_in=16, d_sae=64, **settings, metadata=about))
    saes = {"mlp": make_sae(MLP, exclude_special_tokens=[3, 4, 5]), "temporal": temporal}
    alone = evaluate(temporal, random_model(), dataset_of(TOKENS), **sizes())
    found = evaluate_together(saes, random_model(), dataset_of(TOKENS), **sizes())
    assert (found.alone[1].ce_loss, found.alone[1].kl) == (alone.ce_loss_with_sae, alone.kl)


def test_many_at_different_hooks_are_as_one_by_one() -> None:
    model, dataset = random_model(), dataset_of(TOKENS)
    saes = three() | {"mlp again": make_sae(MLP, seed=7), "whole": make_sae(HEAD)}
    alone = {name: evaluate(sae, model, dataset, **sizes()) for name, sae in saes.items()}
    clean: list[int] = []
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: clean.append(len(args[0])))
    found = evaluate_many(saes, model, dataset, **sizes())
    handle.remove()
    assert [n for n in clean if n > 2] == [4, 4]
    assert found == alone
    assert list(found["head"].layers) == [HEAD, "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]
    assert found["head"].layers[HEAD].mse != found["whole"].layers[HEAD].mse
    hooks = ["blocks.2.hook_resid_post"]
    few = evaluate_many(saes, model, dataset, **sizes(downstream_hooks=hooks))
    assert {tuple(one.downstream_mse) for one in few.values()} == {tuple(hooks)}


# Waiting for the device


class Reads(TorchDispatchMode):
    """Counts what would make the host wait, were the modules on a device: reads of what their weights have a part in."""

    def __init__(self, modules: Iterable[nn.Module], monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.n = 0
        self.on_device = WeakTensorKeyDictionary()
        for module in modules:
            self.on_device.update(dict.fromkeys((*module.parameters(), *module.buffers()), True))
        for name in ("cpu", "tolist", "numpy"):
            monkeypatch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # A mask that selects is turned into numbers first, which are read.
        masks = [m for m in (args[1] if name == "index" else ()) if m is not None and m.dtype == torch.bool]
        reads = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
        self.n += self._any_on_device(args if reads else masks)
        out = func(*args, **(kwargs or {}))
        if self._any_on_device((args, kwargs)):
            self.on_device.update(dict.fromkeys((t for t in tree_leaves(out) if isinstance(t, Tensor)), True))
        return out

    def _any_on_device(self, values: Any) -> bool:
        return any(isinstance(value, Tensor) and value in self.on_device for value in tree_leaves(values))

    def _counted(self, plain: Any) -> Any:
        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.n += self._any_on_device(tensor)
            return plain(tensor, *args, **kwargs)

        return counted


@pytest.mark.parametrize("fields", [{}, {"exclude_special_tokens": [3, 4]}], ids=["all", "excluded"])
@pytest.mark.parametrize("function", [evaluate_many, evaluate_together])
def test_nothing_is_read_from_the_device_but_at_the_end(
    function: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset, saes = random_model(), dataset_of(random_tokens(24, N_POS, D_VOCAB)), three(**fields)

    def n_reads(n_batches: int) -> int:
        with monkeypatch.context() as patches, Reads([model, *saes.values()], patches) as reads:
            function(saes, model, dataset, **sizes(n_batches=n_batches))
        return reads.n

    assert n_reads(6) == n_reads(2) > 0


def test_reads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    for read in (
        lambda y: float(y.sum()),
        lambda y: bool((y > 0).any()),
        lambda y: y[y > 0],
        lambda y: y.argmax(-1).tolist(),
        lambda y: y.cpu(),
    ):
        with monkeypatch.context() as patches, torch.no_grad(), Reads([model], patches) as reads:
            y = model(TOKENS)
            before = reads.n
            y[TOKENS > 3].sum()
            assert reads.n == before
            read(y)
            assert reads.n > before


# Which column


def test_the_column_is_the_one_that_sae_lens_reads() -> None:
    assert column_of({"text": "", "input_ids": [], "tokens": []}) == Column("tokens", True)
    assert column_of(["problem", "text", "input_ids"]) == Column("input_ids", True)
    assert column_of(["problem", "text"]) == Column("text", False)
    assert column_of(["problem"]) == Column("problem", False)
    with pytest.raises(ValueError, match=r"the columns label, id; name that of its tokens 'input_ids', or .*'text'"):
        column_of(["label", "id"])
    with pytest.raises(ValueError, match="no rows or columns"):
        column_of([])


def test_a_dataset_with_both_columns_of_tokens() -> None:
    model, sae = random_model(), make_sae()
    other = random_tokens(8, N_POS, D_VOCAB, seed=1)
    both = Dataset.from_dict({"input_ids": other.tolist(), "tokens": TOKENS.tolist()})
    assert evaluate(sae, model, both, **sizes()) == evaluate(sae, model, dataset_of(TOKENS), **sizes())


# Stored, tabulated, refused


def test_json_files_and_frame(tmp_path: Path) -> None:
    found = evaluate_together(three(), random_model(), dataset_of(TOKENS), **sizes())
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert TogetherEvaluation.from_dict(stored) == TogetherEvaluation.from_dict(found.to_dict()) == found
    assert stored["ce_loss_increase"] == found.ce_loss_increase
    assert read_together(tmp_path) is None
    write_together(found, tmp_path / "saes")
    assert [file.name for file in (tmp_path / "saes").iterdir()] == ["together.json"]
    assert read_together(tmp_path / "saes") == found
    assert list(found.hook_names) == list(TogetherEvaluation.from_dict(stored).hook_names)
    del stored["together"]
    with pytest.raises(ValueError, match="it has no together; evaluate them again"):
        TogetherEvaluation.from_dict(stored)

    frame = together_frame({"mine": found})
    assert list(frame["spliced"]) == ["alone"] * 3 + ["together"] * 3
    assert list(frame["sae"]) == [*DEPTH, *DEPTH]
    assert list(frame["n_saes"]) == [1, 1, 1, 1, 2, 3]
    assert set(frame["group"]) == {"mine"}
    last: Any = frame.iloc[-1]
    assert (last["hook_name"], last["kl"]) == (LAST, found.together[-1].kl)
    assert last["ce_loss_increase"] == pytest.approx(found.ce_loss_increase)


def test_what_cannot_be_evaluated_together() -> None:
    def refused(match: str, saes: dict[str, Any], **options: Any) -> None:
        with pytest.raises(ValueError, match=match) as raised:
            evaluate_together(saes, random_model(), dataset_of(TOKENS), **sizes(**options))
        assert "\n" not in str(raised.value)

    refused("saes is empty", {})
    refused("a and b both write blocks.1.hook_mlp_out", {"a": make_sae(MLP), "b": make_sae(MLP, seed=1)})
    refused("whole and head both write blocks.1.attn.hook_z", {"whole": make_sae(HEAD), **three()})
    refused("b: hook_name: the model has no hook 'blocks.9", {"a": make_sae(), "b": make_sae("blocks.9.hook_mlp_out")})
    refused("b: sae.d_in=8 does not fit blocks.1.hook_mlp_out", {"a": make_sae(), "b": make_sae(MLP, d_in=8)})
    refused("'last' and 'b' differ in seqpos_slice", {**three(), "b": make_sae(MLP, seqpos_slice=(1, None))})
    refused("context_size=20 is longer", three(), context_size=20)
    refused("n_batches=0 must be at least 1", three(), n_batches=0)
    config = TranscoderConfig(d_in=16, d_sae=40, d_out=16, apply_b_dec_to_input=False, metadata=metadata(hook_name=MLP))
    refused("metadata.hook_name_out is not set", {"a": make_sae(), "b": Transcoder(config)})
    for option in ("alive_tokens", "downstream_hooks", "n_batch"):
        with pytest.raises(TypeError, match=option):
            evaluate_together(three(), random_model(), dataset_of(TOKENS), **{option: 1})


def test_an_sae_of_many_that_does_not_fit_is_named() -> None:
    def refused(match: str, **options: Any) -> None:
        saes = three() | {"b": options.pop("sae", make_sae())}
        with pytest.raises(ValueError, match=match):
            evaluate_many(saes, random_model(), dataset_of(TOKENS), **sizes(**options))

    refused("^b: sae.d_in=8 does not fit", sae=make_sae(MLP, d_in=8))
    refused("^b: hook_name: the model has no hook 'blocks.9", sae=make_sae("blocks.9.hook_mlp_out"))
    refused("^last: downstream_hooks: blocks.1.hook_resid_post is not", downstream_hooks=["blocks.1.hook_resid_post"])
    refused("^last: downstream_hooks: blocks.0.hook_resid_pre is not", downstream_hooks=["blocks.0.hook_resid_pre"])


def test_options_are_checked_where_they_are_made() -> None:
    for name in ("batch_size_prompts", "n_batches", "max_tokens", "context_size", "alive_tokens"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            EvaluationOptions(**dict[str, Any]({name: 0}))
    with pytest.raises(TypeError, match="n_batch"):
        evaluate(make_sae(), random_model(), dataset_of(TOKENS), n_batch=1)


# Old names


def test_modules_that_moved_are_imported_by_their_old_names(tmp_path: Path) -> None:
    code = f"""
import importlib, sys
import sae_lens_e2e.evaluation
assert not any(name.startswith("sae_lens_e2e.studies") for name in sys.modules), "imported early"
for name in {MOVED}:
    old = importlib.import_module("sae_lens_e2e.evaluation." + name)
    new = importlib.import_module("sae_lens_e2e.studies." + name)
    assert old is new and new.__spec__.name == new.__name__, name
from sae_lens_e2e.evaluation import pareto
from sae_lens_e2e.evaluation.geometry import Geometry
import sae_lens_e2e.studies.geometry as geometry
assert Geometry is geometry.Geometry
try:
    import sae_lens_e2e.evaluation.topology
except ModuleNotFoundError:
    print("done")
"""
    done = run_stock(code, cwd=tmp_path)
    assert done.stdout.strip() == "done", done.stderr
