"""Evaluation against its equations written out, SAELens' own figures, and Apollo's."""

import copy
import gc
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, IterableDataset
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TrainingSAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import HookedProxyLM
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sae_lens_e2e import embedded
from sae_lens_e2e.evaluation import (
    Evaluation,
    evaluate,
    evaluate_many,
    evaluation_frame,
    firing_frame,
    layers_frame,
)
from sae_lens_e2e.evaluation.features import LOG10_EDGES, FeatureSums, firing_histogram
from sae_lens_e2e.evaluation.next_token import compare_next_tokens
from sae_lens_e2e.evaluation.sums import TotalVariance
from sae_lens_e2e.splice import NO_LABEL, Where, unembedding
from sae_lens_e2e.splice.unembedding import LinearUnembedding, ModuleUnembedding
from tests.models import D_MODEL, GOLDEN, apollo_tiny4l, dataset_of, random_model, random_tokens
from tests.test_apollo_parity import to_ours
from tests.test_architectures import CONFIGS
from tests.training import make_runner, runner_config

HOOK, LATER = "blocks.1.hook_resid_pre", ["blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]
D_VOCAB, N_POS = 61, 12
TOKENS = random_tokens(8, N_POS, D_VOCAB)


def metadata(**fields: Any) -> SAEMetadata:
    return SAEMetadata(**{"hook_name": HOOK, "context_size": N_POS, "prepend_bos": False} | fields)


def make_sae(d_in: int = 16, seed: int = 0, dtype: str = "float32", **fields: Any) -> StandardSAE:
    """A random SAE, three of whose 40 features never fire, that reconstructs badly but not absurdly."""
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=40, dtype=dtype, metadata=metadata(**fields)))
    with torch.no_grad():
        sae.W_dec.mul_(0.2)
        sae.b_enc[:3] = -100.0
    return sae


def sizes(**overrides: Any) -> dict[str, Any]:
    return {"batch_size_prompts": 4, "verbose": False, **overrides}


# The figures are their equations


def flat_mask(tokens: Tensor, excluded: list[int], seqpos: tuple[int | None, ...]) -> Tensor:
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, slice(*seqpos)] = True
    return mask & ~torch.isin(tokens, torch.tensor(excluded, dtype=torch.long))


def with_activation(model: HookedTransformer, tokens: Tensor, hook: str, activation: Tensor) -> tuple[Tensor, Any]:
    """All logits and all activations with another one put in at the hook, in float64."""
    with torch.no_grad(), model.hooks(fwd_hooks=[(hook, lambda _, hook: activation)]):  # noqa: ARG005
        logits, cache = model.run_with_cache(tokens)
    assert isinstance(logits, Tensor)
    return logits.double(), cache


def check_layer(found: Any, clean: Tensor, changed: Tensor, mask: Tensor, first: Tensor) -> None:
    """Each figure of a layer, from all activations at once: (batch, pos, d)."""
    clean, changed = clean.double(), changed.double()
    a, b = clean[mask], changed[mask]
    norm = torch.nn.LayerNorm(a.shape[-1], elementwise_affine=False, dtype=torch.float64)
    for suffix, x, y in (("", a, b), ("_ln", norm(a), norm(b))):
        assert getattr(found, f"mse{suffix}") == pytest.approx(float((y - x).square().mean()), rel=1e-4)
        explained = 1 - float((y - x).square().sum() / (x - x.mean(0)).square().sum())
        assert getattr(found, f"explained_variance{suffix}") == pytest.approx(explained, rel=1e-4, abs=1e-6)
    for suffix, where in (("", mask), ("_first", mask & first), ("_later", mask & ~first)):
        a, b = clean[where], changed[where]
        ratio, cosine = getattr(found, f"l2_ratio{suffix}"), getattr(found, f"cosine{suffix}")
        if len(a) == 0:
            assert ratio is cosine is None
            continue
        norms = a.norm(dim=-1), b.norm(dim=-1)
        assert ratio == pytest.approx(float((norms[1] / norms[0]).mean()), rel=1e-4)
        assert cosine == pytest.approx(float(((a * b).sum(-1) / norms[0] / norms[1]).mean()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("excluded", "seqpos"),
    [([], (None,)), ([1, 2, 3, 4, 5], (None,)), ([], (1, None)), ([7, 9], (2, -3)), ([], (0, 4, 2))],
    ids=["all", "excluded", "not the first", "both", "strided"],
)
def test_every_figure_is_its_equation(excluded: list[int], seqpos: tuple[int | None, ...]) -> None:
    model = random_model()
    sae = make_sae(exclude_special_tokens=excluded or False, seqpos_slice=seqpos)
    dataset = dataset_of(torch.cat([TOKENS, TOKENS[:2]]))  # two prompts that fill no batch
    found = evaluate(sae, model, dataset, **sizes())

    mask = flat_mask(TOKENS, excluded, seqpos)
    first = torch.zeros_like(mask)
    first[:, 0] = True
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
        x = cache[HOOK]
        features = sae.encode(x)
        x_hat = sae.decode(features)
    spliced_logits, spliced = with_activation(model, TOKENS, HOOK, torch.where(mask[..., None], x_hat, x))
    ablated_logits, _ = with_activation(model, TOKENS, HOOK, torch.zeros_like(x))
    assert isinstance(logits, Tensor)
    log_p, log_q, log_r = (z.double().log_softmax(-1) for z in (logits, spliced_logits, ablated_logits))
    predicting = mask[:, :-1]

    def ce(log_probs: Tensor) -> float:
        return float(-log_probs[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0][predicting].mean())

    def kl(log_probs: Tensor) -> float:
        return float((log_p.exp() * (log_p - log_probs)).sum(-1)[mask].mean())

    def accuracy(log_probs: Tensor) -> float:
        return float((log_probs[:, :-1].argmax(-1) == TOKENS[:, 1:])[predicting].double().mean())

    fired = features[mask] != 0
    expected = {
        "ce_loss_without_sae": ce(log_p),
        "ce_loss_with_sae": ce(log_q),
        "ce_loss_with_ablation": ce(log_r),
        "ce_loss_increase": ce(log_q) - ce(log_p),
        "ce_loss_score": (ce(log_r) - ce(log_q)) / (ce(log_r) - ce(log_p)),
        "kl": kl(log_q),
        "kl_with_ablation": kl(log_r),
        "top1_agreement": float((log_p.argmax(-1) == log_q.argmax(-1))[mask].double().mean()),
        "top1_accuracy_without_sae": accuracy(log_p),
        "top1_accuracy_with_sae": accuracy(log_q),
        "statistical_distance": float((log_p.exp() - log_q.exp()).abs().sum(-1)[mask].mean() / 2),
        "l0": float(fired.sum(-1).double().mean()),
        "l1": float(features[mask].abs().sum(-1).double().mean()),
        "n_alive": int(fired.any(0).sum()),
        "fraction_alive": int(fired.any(0).sum()) / 40,
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    assert found.n_alive <= 37
    assert (found.n_tokens, found.n_tokens_measured, found.n_tokens_alive) == (96, int(mask.sum()), int(mask.sum()))
    assert list(found.layers) == [HOOK, *LATER]
    check_layer(found.at_hook, x, x_hat, mask, first)
    for hook in LATER:
        check_layer(found.layers[hook], cache[hook], spliced[hook], mask, first)
    assert found.downstream_mse == {hook: found.layers[hook].mse for hook in LATER}
    assert sum(found.firing.counts) + found.firing.n_never == 40
    assert found.firing.n_never == 40 - int(fired.any(0).sum())
    assert found.firing_frequency is not None
    assert found.alive is not None
    torch.testing.assert_close(found.firing_frequency, fired.double().mean(0))
    assert torch.equal(found.alive, fired.any(0))


def test_any_batch_size_gives_the_same_figures() -> None:
    model, sae, dataset = random_model(), make_sae(), dataset_of(TOKENS)
    at_once = flat(evaluate(sae, model, dataset, **sizes(batch_size_prompts=8)).to_dict())
    for size in (1, 2, 4):
        in_batches = flat(evaluate(sae, model, dataset, **sizes(batch_size_prompts=size)).to_dict())
        assert in_batches == pytest.approx(at_once, rel=1e-5), size


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number in nested dictionaries, by its path."""
    found = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found


# SAELens' own figures


def llama() -> HookedProxyLM:
    config = LlamaConfig(
        vocab_size=D_VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=16, initializer_range=0.4,
    )  # fmt: skip
    return hugging_face(LlamaForCausalLM(config))


def gpt2() -> HookedProxyLM:
    config = GPT2Config(
        vocab_size=D_VOCAB, n_embd=16, n_layer=3, n_head=4, n_positions=16, initializer_range=0.4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return hugging_face(GPT2LMHeadModel(config))


def hugging_face(model: Any) -> HookedProxyLM:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return HookedProxyLM(model.eval(), tokenizer=None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("make_model", "d_in", "fields"),
    [
        (random_model, 16, {}),
        (lambda: random_model("RMS", output_logits_soft_cap=3.0), 16, {}),
        (random_model, 16, {"exclude_special_tokens": [1, 2, 3]}),
        (random_model, 16, {"hook_name": "blocks.2.hook_resid_post"}),
        (random_model, 16, {"hook_name": "blocks.1.hook_mlp_out"}),
        (random_model, 16, {"hook_name": "blocks.1.attn.hook_z"}),
        (random_model, 4, {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2}),
        (llama, 16, {"hook_name": "model.layers.0"}),
        (llama, 16, {"hook_name": "model.layers.1.mlp", "exclude_special_tokens": [1, 2, 3]}),
        (gpt2, 16, {"hook_name": "transformer.h.1"}),
    ],
    ids=["resid", "RMS, soft cap", "excluded", "last", "mlp", "hook_z", "one head", "llama", "llama mlp", "gpt2"],
)
def test_figures_are_sae_lens_own(make_model: Callable[[], Any], d_in: int, fields: dict[str, Any]) -> None:
    model, sae, dataset = make_model(), make_sae(d_in, **fields), dataset_of(TOKENS)
    found = evaluate(sae, model, dataset, **sizes())
    store = ActivationsStore.from_sae(model, sae, dataset, streaming=False, store_batch_size_prompts=4, total_tokens=0)
    metrics, features = run_evals(
        sae, store, model, ActivationScaler(), get_eval_everything_config(4, 2, 2),
        exclude_special_tokens=fields.get("exclude_special_tokens", False),
    )  # fmt: skip
    at_hook = found.at_hook
    ours = {
        "model_behavior_preservation": {"kl_div_with_sae": found.kl, "kl_div_with_ablation": found.kl_with_ablation},
        "model_performance_preservation": {
            "ce_loss_score": found.ce_loss_score,
            "ce_loss_with_ablation": found.ce_loss_with_ablation,
            "ce_loss_with_sae": found.ce_loss_with_sae,
            "ce_loss_without_sae": found.ce_loss_without_sae,
        },
        "reconstruction_quality": {
            "explained_variance": at_hook.explained_variance,
            "mse": at_hook.mse * d_in,
            "cossim": at_hook.cosine,
        },
        "shrinkage": {"l2_ratio": at_hook.l2_ratio},
        "sparsity": {"l0": found.l0, "l1": found.l1},
    }
    for group, figures in ours.items():
        for name, value in figures.items():
            assert value == pytest.approx(metrics[group][name], rel=1e-4), name
    density = torch.tensor(features["feature_density"])
    assert found.n_alive == int((density > 0).sum())
    assert found.firing == firing_histogram(density.double())


# Apollo's figures


def apollo_sae(golden: dict[str, Tensor]) -> StandardSAE:
    """A checkpoint of Apollo's as a stock SAE: its decoder is normalised in every forward pass."""
    parameters = to_ours(golden, "param")
    parameters["W_dec"] = F.normalize(parameters["W_dec"], dim=1)
    fields = {"hook_name": "blocks.2.hook_resid_pre", "context_size": 64}
    cfg = StandardSAEConfig(d_in=D_MODEL, d_sae=8 * D_MODEL, apply_b_dec_to_input=False, metadata=metadata(**fields))
    sae = StandardSAE(cfg)
    sae.load_state_dict(parameters)
    return sae


@pytest.mark.parametrize("run", ["local", "e2e_ds"])
def test_figures_are_apollos(run: str) -> None:
    golden = load_file(GOLDEN / f"apollo_{run}.safetensors")
    theirs = json.loads((GOLDEN / "apollo_metrics.json").read_text())[run]
    hooks = ["blocks.2.hook_resid_post", "blocks.3.hook_resid_pre", "blocks.3.hook_resid_post"]
    found = evaluate(apollo_sae(golden), apollo_tiny4l(), dataset_of(golden["tokens"]), **sizes(downstream_hooks=hooks))
    performance = {
        "orig_model_ce_loss": found.ce_loss_without_sae,
        "sae_model_ce_loss": found.ce_loss_with_sae,
        "difference_ce_loss": -found.ce_loss_increase,
        "orig_vs_sae_top1_consistency": found.top1_agreement,
        "orig_vs_sae_statistical_distance": found.statistical_distance,
    }
    ours = {f"performance/train/{name}": value for name, value in performance.items()}
    ours["sparsity/train/L_0/blocks.2.hook_resid_pre"] = found.l0
    ours["sparsity/train/frac_zeros/blocks.2.hook_resid_pre"] = 1 - found.l0 / found.d_sae
    ours["loss.out_to_in.blocks.2.hook_resid_pre"] = found.at_hook.mse
    if run == "e2e_ds":
        ours["loss.logits_kl"] = found.kl
        ours |= {f"loss.in_to_orig.{hook}": mse for hook, mse in found.downstream_mse.items()}
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-4), name


def test_top1_accuracy_is_of_the_next_token_where_apollos_is_of_the_same_one() -> None:
    """Apollo compares the prediction after a token with that token, of 512, so that hardly any is ever right."""
    golden = load_file(GOLDEN / "apollo_local.safetensors")
    theirs = json.loads((GOLDEN / "apollo_metrics.json").read_text())["local"]
    tokens, model = golden["tokens"], apollo_tiny4l()
    found = evaluate(apollo_sae(golden), model, dataset_of(tokens), **sizes())
    with torch.no_grad():
        predicted = model(tokens).argmax(-1)
    unshifted = float((predicted == tokens).double().mean())
    assert unshifted == pytest.approx(theirs["performance/train/orig_model_top1_accuracy"], abs=1e-6)
    shifted = float((predicted[:, :-1] == tokens[:, 1:]).double().mean())
    assert found.top1_accuracy_without_sae == pytest.approx(shifted, abs=1e-6)
    assert shifted > 0.25 > 0.01 > unshifted


@pytest.mark.parametrize("run", ["local", "e2e_ds"])
def test_explained_variance_is_of_the_activation_where_apollos_is_of_the_output(run: str) -> None:
    """Apollo divides the error by the variance of the SAE's output, not of its input, and averages a ratio per token.

    At later layers it divides by the right variance, still token by token. Both are known here to give its figures exactly, so
    the difference is one of definition: ours, like SAELens', is one ratio of two sums.
    """
    golden = load_file(GOLDEN / f"apollo_{run}.safetensors")
    theirs = json.loads((GOLDEN / "apollo_metrics.json").read_text())[run]
    hook, last, tokens, model = "blocks.2.hook_resid_pre", "blocks.3.hook_resid_post", golden["tokens"], apollo_tiny4l()
    sae = apollo_sae(golden)
    found = evaluate(sae, model, dataset_of(tokens), **sizes())
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        x_hat = sae.decode(sae.encode(cache[hook]))
    _, spliced = with_activation(model, tokens, hook, x_hat)

    def per_token(error_of: Tensor, variance_of: Tensor) -> float:
        a, b = error_of.flatten(0, 1), variance_of.flatten(0, 1)
        return float((1 - (a - b).square().sum(-1) / (b - b.mean(0)).square().sum(-1)).mean())

    def normed(x: Tensor) -> Tensor:
        return F.layer_norm(x, (D_MODEL,))

    ours = found.layers
    swapped = {"": per_token(cache[hook], x_hat), "_ln": per_token(normed(cache[hook]), normed(x_hat))}
    for suffix, value in swapped.items():
        assert value == pytest.approx(theirs[f"loss.out_to_in.explained_variance{suffix}/{hook}"], abs=1e-5)
    assert abs(ours[hook].explained_variance - swapped[""]) > 5e-4
    if run == "e2e_ds":
        unpooled = per_token(spliced[last], cache[last])
        assert unpooled == pytest.approx(theirs[f"loss.in_to_orig.explained_variance/{last}"], abs=1e-5)
        assert abs(ours[last].explained_variance - unpooled) > 5e-4


# The sums


def test_variance_of_a_stream_survives_a_large_mean() -> None:
    """Σ‖x‖² - n‖mean‖² would lose all of this variance in float32, and most of it in a float64 sum of float32 squares."""
    torch.manual_seed(0)
    x = (1e4 * torch.randn(8) + 0.1 * torch.randn(3000, 8)).float()
    variance = TotalVariance()
    for batch in x.split([1, 999, 1500, 500]):
        variance.add(batch)
    expected = float((x.double() - x.double().mean(0)).square().sum())
    assert variance.sum_of_squares == pytest.approx(expected, rel=1e-5)
    assert variance.explained(0.25 * expected) == pytest.approx(0.75, rel=1e-5)


def test_constant_activations_are_explained_wholly_or_not_at_all() -> None:
    variance = TotalVariance()
    variance.add(torch.ones(5, 3))
    assert (variance.explained(0.0), variance.explained(1e-3)) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "capped", "module"])
def test_next_token_measures_in_chunks(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 on the logits in the unembedding's own precision, in chunks of a few tokens."""
    monkeypatch.setitem(unembedding.CHUNK_BYTES, "cpu", unembedding.N_BUFFERS * 4 * 50 * 7)
    monkeypatch.setitem(unembedding.CHUNK_ROWS, "narrow", 1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 50, generator=generator).to(dtype)
    clean, other, third = (torch.randn(30, 8, generator=generator).to(dtype) for _ in range(3))
    targets = torch.randint(0, 50, (30,), generator=generator)
    targets[::5] = NO_LABEL
    cap = 2.0 if kind == "capped" else None
    head = ModuleUnembedding(lambda h: h @ weight, 50) if kind == "module" else LinearUnembedding(weight, soft_cap=cap)
    of_clean, (_, found) = compare_next_tokens(head, clean, [other, third], targets)

    def log_probs(h: Tensor) -> Tensor:
        logits = (h @ weight).double()
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    log_p, log_q = log_probs(clean), log_probs(third)
    known = targets != NO_LABEL
    expected = {
        "ce": -log_q[known, targets[known]],
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "statistical_distance": (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
        "top1_accuracy": (log_q.argmax(-1) == targets)[known].double(),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(of_clean["ce"].double(), -log_p[known, targets[known]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_low_precision_model_is_summed_in_full_precision(dtype: str) -> None:
    """A mean over 3,072 tokens in bfloat16 would keep two digits, and a sum of so many ones stop at 256."""
    model = random_model(dtype=torch.bfloat16)
    tokens = random_tokens(256, N_POS, D_VOCAB)
    hook = "blocks.0.hook_resid_pre"  # the embedding, which no kernel rounds in its own way
    sae = make_sae(dtype=dtype, hook_name=hook)
    found = evaluate(sae, model, dataset_of(tokens), **sizes(batch_size_prompts=64))
    with torch.no_grad():
        x = model.run_with_cache(tokens, names_filter=hook)[1][hook]
        features = torch.cat([sae.encode(part) for part in x.split(64)])
        x_hat = torch.cat([sae.decode(part) for part in features.split(64)])
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    first = torch.zeros_like(everywhere)
    first[:, 0] = True
    check_layer(found.at_hook, x, x_hat, everywhere, first)
    assert found.l0 == pytest.approx(float((features != 0).sum(-1).double().mean()), rel=1e-9)
    assert found.l1 == pytest.approx(float(features.double().abs().sum(-1).mean()), rel=1e-5)


def test_alive_features_fired_within_the_window_to_the_token() -> None:
    features = torch.zeros(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    features[0, 1, 0] = 1.0  # the 2nd token that counts
    features[0, 2, 1] = 1.0  # one that does not
    features[1, 1, 2] = -1.0  # the 4th; a feature may fire negatively
    features[1, 2, 3] = 1.0  # the 5th
    for window, alive in ((1, 0), (2, 1), (3, 1), (4, 2), (5, 3), (500_000, 3)):
        sums = FeatureSums(4, window, torch.device("cpu"))
        for batch, kept in zip(features.split(1), mask.split(1), strict=True):
            sums.add(batch, Where(kept))
        assert (int(sums.alive.sum()), sums.n_tokens_alive) == (alive, min(window, 5))
        assert sums.firing.tolist() == [1, 0, 1, 1]


def test_histogram_of_firing_frequencies() -> None:
    histogram = firing_histogram(torch.tensor([0.0, 0.0, 1e-12, 2e-8, 0.01, 0.0101, 0.9, 1.0], dtype=torch.float64))
    assert histogram.n_never == 2
    at = {(round(low, 2)): n for low, n in zip(LOG10_EDGES, histogram.counts, strict=False) if n}
    assert at == {-8.0: 1, -7.75: 1, -2.0: 2, -0.25: 2}
    assert (LOG10_EDGES[0], LOG10_EDGES[-1], len(histogram.counts)) == (-8.0, 0.0, 32)


# Any SAE


INFERENCE = [name for name, (kind, _) in SAE_CLASS_REGISTRY.items() if not issubclass(kind, Transcoder)]
SPECIAL: dict[str, dict[str, Any]] = {
    "topk": {"k": 5},
    "abstopk": {"k": 5},
    "matching_pursuit": {"max_iterations": 4},
    "temporal": {"n_heads": 2, "bottleneck_factor": 8, "kval_topk": 6},
}


def inference_sae(name: str) -> SAE[Any]:
    """Of any architecture that SAELens can run at a single hook."""
    sae_class, config_class = SAE_CLASS_REGISTRY[name]
    torch.manual_seed(0)
    return sae_class(config_class(d_in=16, d_sae=64, **SPECIAL.get(name, {}), metadata=metadata()))


def training_sae(name: str) -> TrainingSAE[Any]:
    """Of any architecture that is trained, as the runner leaves it."""
    runner = make_runner(runner_config(sae=copy.deepcopy(CONFIGS[name])))
    runner._set_sae_metadata()
    return runner.sae


def sparse_sae() -> TrainingSAE[Any]:
    """One whose activations are sparse tensors."""
    cfg = TopKTrainingSAEConfig(d_in=16, d_sae=40, k=3, use_sparse_activations=True, metadata=metadata())
    return TopKTrainingSAE(cfg)


@pytest.mark.parametrize(
    "make",
    [
        *(partial(inference_sae, name) for name in INFERENCE),
        *(partial(training_sae, name) for name in CONFIGS),
        sparse_sae,
    ],
    ids=[*INFERENCE, *(f"training {name}" for name in CONFIGS), "sparse"],
)
def test_every_architecture(make: Callable[[], SAE[Any]]) -> None:
    model, sae = random_model(), make()
    sae.train()
    found = evaluate(sae, model, dataset_of(TOKENS), **sizes(batch_size_prompts=8))
    with torch.no_grad():
        x = model.run_with_cache(TOKENS, names_filter=HOOK)[1][HOOK]
        # A TemporalSAE's decode leaves out what it predicts from the context.
        features = sae.encode(x)
        x_hat = sae(x) if isinstance(sae, TemporalSAE) else sae.decode(features)
    features = features.to_dense()
    assert found.l0 == pytest.approx(float((features != 0).sum(-1).double().mean()))
    assert found.at_hook.mse == pytest.approx(float((x_hat - x).double().square().mean()), rel=1e-4)
    log_p = with_activation(model, TOKENS, HOOK, x)[0].log_softmax(-1)
    log_q = with_activation(model, TOKENS, HOOK, x_hat)[0].log_softmax(-1)
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
    assert found.architecture == sae.cfg.architecture()
    # Everything is as it was.
    assert sae.training
    assert all(parameter.requires_grad for parameter in sae.parameters())


def test_labels_say_what_was_evaluated() -> None:
    sae = training_sae("topk")
    found = evaluate(sae, random_model(), dataset_of(TOKENS), **sizes())
    assert (found.objective, found.architecture, found.model_name) == ("e2e_ds", "topk", "tiny")
    assert (found.hook_name, found.hook_head_index, found.context_size) == (HOOK, None, N_POS)
    assert (found.d_in, found.d_sae, found.sparsity) == (16, 128, {"k": 2})
    stock = evaluate(make_sae(), random_model(), dataset_of(TOKENS), **sizes())
    assert (stock.objective, stock.model_name, stock.sparsity) == (None, None, {})


def test_heads_that_an_sae_reshapes_itself_are_reshaped_again_afterwards() -> None:
    hook = "blocks.1.attn.hook_z"
    torch.manual_seed(0)
    cfg = StandardSAEConfig(d_in=16, d_sae=40, reshape_activations="hook_z", metadata=metadata(hook_name=hook))
    sae, plain = StandardSAE(cfg), make_sae(hook_name=hook)
    plain.load_state_dict(sae.state_dict())
    model = random_model()
    results = evaluate_many({"reshapes": sae, "plain": plain}, model, dataset_of(TOKENS), **sizes())
    assert results["reshapes"] == results["plain"]
    assert sae.hook_z_reshaping_mode
    assert not plain.hook_z_reshaping_mode
    assert sae(torch.randn(1, 2, 4, 4)).shape == (1, 2, 4, 4)


def test_the_model_is_put_back() -> None:
    model = random_model()
    model.train()
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(make_sae(), model, dataset_of(TOKENS), **sizes())
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameters[name], value) for name, value in model.state_dict().items())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_dropout_is_off() -> None:
    model, dataset = gpt2(), dataset_of(TOKENS)
    sae = make_sae(hook_name="transformer.h.1")
    as_it_should_be = evaluate(sae, model, dataset, **sizes())
    model.train()
    assert evaluate(sae, model, dataset, **sizes()) == as_it_should_be
    assert model.training


# Several at once, and one pass


def test_many_are_as_one_by_one_and_share_the_clean_pass() -> None:
    model, dataset = random_model(), dataset_of(TOKENS)
    saes = {f"sae {seed}": make_sae(seed=seed) for seed in range(3)}
    alone = {name: evaluate(sae, model, dataset, **sizes()) for name, sae in saes.items()}
    prompts: list[int] = []
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: prompts.append(len(args[0])))
    together = evaluate_many(saes, model, dataset, **sizes())
    handle.remove()
    # Spliced passes start behind this block, and the checks that SAEs fit run on one prompt or two.
    assert [n for n in prompts if n > 2] == [4, 4]
    assert list(together) == list(saes)
    assert together == alone
    assert len({result.kl for result in together.values()}) == 3


def test_the_data_are_read_once() -> None:
    read: list[int] = []

    def rows() -> Any:
        for row, tokens in enumerate(TOKENS.tolist()):
            read.append(row)
            yield {"input_ids": tokens}

    streamed: Any = IterableDataset.from_generator(rows)
    found = evaluate(make_sae(), random_model(), streamed, **sizes())
    assert read == [0, 0, *range(8)]  # we and SAELens look at the first row to see what there is
    assert found == evaluate(make_sae(), random_model(), dataset_of(TOKENS), **sizes())


def test_memory_does_not_grow_with_the_data() -> None:
    model, sae = random_model(), make_sae()
    alive: list[int] = []

    def count(*_: Any) -> None:
        tensors = [t for t in gc.get_objects() if type(t) is Tensor]
        alive.append(sum(t.numel() for t in tensors))

    handle = model.blocks[0].mlp.register_forward_pre_hook(count)
    evaluate(sae, model, dataset_of(random_tokens(24, N_POS, D_VOCAB)), **sizes())
    handle.remove()
    assert len(set(alive[-5:])) == 1  # of six batches all but the first


# Which tokens


def test_limits_on_how_much_is_evaluated() -> None:
    model, sae, dataset = random_model(), make_sae(), dataset_of(random_tokens(20, N_POS, D_VOCAB))

    def n_tokens(**limits: Any) -> int:
        return evaluate(sae, model, dataset, **sizes(**limits)).n_tokens

    batch = 4 * N_POS
    assert n_tokens() == n_tokens(n_batches=100) == n_tokens(max_tokens=10**9) == 5 * batch
    assert n_tokens(n_batches=2) == n_tokens(max_tokens=2 * batch) == n_tokens(max_tokens=3 * batch - 1) == 2 * batch
    assert n_tokens(n_batches=3, max_tokens=batch) == batch
    assert n_tokens(context_size=8) == 5 * 4 * 8
    few = evaluate(sae, model, dataset, **sizes(alive_tokens=1))
    x = model.run_with_cache(torch.tensor(dataset[0]["input_ids"])[None], names_filter=HOOK)[1][HOOK]
    assert few.n_alive == int((sae.encode(x[0, 0]) != 0).sum())
    assert few.n_tokens_alive == 1


def tokenizer_of(model: HookedTransformer) -> Any:
    return model.tokenizer


def test_text_is_tokenised_as_sae_lens_does_it() -> None:
    model = embedded.load_model()
    stories = ["Once upon a time there was a cat. " * 20, "The dog ran to the tree and said hello. " * 20] * 3
    text = Dataset.from_dict({"text": stories})
    sae = make_sae(64, hook_name=embedded.HOOK_NAME, context_size=32, prepend_bos=True)
    found = evaluate(sae, model, text, **sizes())
    store = ActivationsStore.from_sae(model, sae, text, streaming=False, store_batch_size_prompts=4)
    tokens = torch.cat([store.get_batch_tokens(4) for _ in range(found.n_tokens // (4 * 32))])
    assert tokens[:, 0].unique().tolist() == [tokenizer_of(model).bos_token_id]
    assert found == evaluate(sae, model, dataset_of(tokens.cpu()), **sizes())
    assert found.n_tokens >= 4 * 4 * 32


def test_special_tokens_are_the_tokenizers() -> None:
    model, dataset = embedded.load_model(), embedded.load_dataset("held_out").select(range(4))
    bos: int = tokenizer_of(model).bos_token_id
    fields: dict[str, Any] = {"hook_name": embedded.HOOK_NAME, "context_size": 256}
    by_name, by_id = (
        make_sae(64, exclude_special_tokens=True, **fields),
        make_sae(64, exclude_special_tokens=[bos], **fields),
    )
    results = evaluate_many({"name": by_name, "id": by_id}, model, dataset, **sizes())
    assert results["name"] == results["id"]
    n_special = int((torch.tensor(dataset["input_ids"][:]) == bos).sum())
    assert results["id"].n_tokens - results["id"].n_tokens_measured == n_special >= 4
    assert results["id"].at_hook.l2_ratio_first is None


def test_a_hook_outside_the_blocks_has_no_later_layers() -> None:
    for model, hook in ((random_model(), "ln_final.hook_normalized"), (llama(), "model.norm")):
        found = evaluate(make_sae(hook_name=hook), model, dataset_of(TOKENS), **sizes(downstream_hooks=()))
        assert list(found.layers) == [hook]
        assert found.kl > 0


def test_a_dataset_of_the_callers_keeps_its_format() -> None:
    dataset = dataset_of(TOKENS).add_column("id", list(range(8)))  # pyright: ignore[reportCallIssue]
    before = dataset.format
    evaluate(make_sae(), random_model(), dataset, **sizes())
    assert dataset.format == before
    assert dataset[0]["id"] == 0


# Bad input


def refused(match: str, *, sae: Any = None, model: Any = None, dataset: Any = None, **overrides: Any) -> None:
    """The error is raised, and the language model has not run on a batch of tokens."""
    model = model or random_model()
    ran: list[int] = []
    handle = model.embed.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    with pytest.raises(ValueError, match=match) as raised:
        evaluate(sae or make_sae(), model, dataset_of(TOKENS) if dataset is None else dataset, **sizes(**overrides))
    handle.remove()
    assert max(ran, default=0) <= 2
    assert "\n" not in str(raised.value)


def test_datasets_that_cannot_be_evaluated() -> None:
    refused("8 prompts.*batch_size_prompts=9", batch_size_prompts=9)
    refused("the dataset is empty", dataset=dataset_of(TOKENS[:0]))
    refused("8 tokens, fewer than context_size=12", dataset=dataset_of(TOKENS[:, :8]))
    refused("splits.*train.*one of them", dataset=DatasetDict({"train": dataset_of(TOKENS)}))
    refused("text.*tokenizer", dataset=Dataset.from_dict({"text": ["a story"]}))
    refused("columns label.*'input_ids'", dataset=Dataset.from_dict({"label": [1]}))
    refused(
        "too few for batch_size_prompts=4 of 32",
        sae=make_sae(64, hook_name=embedded.HOOK_NAME, context_size=32),
        model=embedded.load_model(),
        dataset=Dataset.from_dict({"text": ["a story"]}),
    )
    refused("token 99.*knows 61", dataset=dataset_of(torch.where(TOKENS == 60, 99, TOKENS)))


def test_saes_that_do_not_fit() -> None:
    refused("no hook 'blocks.9.hook_resid_pre'", sae=make_sae(hook_name="blocks.9.hook_resid_pre"))
    refused("no hook.*blocks.2.hook_resid_pr'", downstream_hooks=["blocks.2.hook_resid_pr"])
    refused("not downstream", downstream_hooks=["blocks.0.hook_resid_pre"])
    refused("d_in=8.*16 wide", sae=make_sae(8))
    refused("hook_head_index=5", sae=make_sae(4, hook_name="blocks.1.attn.hook_z", hook_head_index=5))
    refused("metadata.hook_name is not set", sae=make_sae(hook_name=None))
    refused("metadata.context_size is not set", sae=make_sae(context_size=None))
    refused("context_size=20.*16", dataset=dataset_of(random_tokens(8, 20, D_VOCAB)), context_size=20)
    refused("exclude_special_tokens=True.*tokenizer", sae=make_sae(exclude_special_tokens=True))
    refused("seqpos_slice.*next token", sae=make_sae(seqpos_slice=(-1, None)))
    config = TranscoderConfig(d_in=16, d_sae=40, d_out=16, apply_b_dec_to_input=False, metadata=metadata())
    refused("metadata.hook_name_out is not set", sae=Transcoder(config))
    scaled = make_sae()
    scaled.cfg.normalize_activations = "expected_average_only_in"
    refused("normalize_activations='expected_average_only_in'", sae=scaled)


def test_limits_that_leave_nothing() -> None:
    for name in ("batch_size_prompts", "n_batches", "max_tokens", "alive_tokens"):
        refused(f"{name}=0 must be at least 1", **{name: 0})
    refused("max_tokens=47 is less than one batch, 48", max_tokens=47)
    with pytest.raises(ValueError, match="no token of the dataset to measure"):
        evaluate(make_sae(exclude_special_tokens=list(range(D_VOCAB))), random_model(), dataset_of(TOKENS), **sizes())


def test_saes_that_cannot_share_a_pass() -> None:
    def both(**fields: Any) -> None:
        saes = {"a": make_sae(), "b": make_sae(**fields)}
        evaluate_many(saes, random_model(), dataset_of(TOKENS), **sizes())

    for name, value in (
        ("context_size", 10),
        ("seqpos_slice", (1, None)),
        ("exclude_special_tokens", [3]),
    ):
        with pytest.raises(ValueError, match=f"'a' and 'b' differ in {name}"):
            both(**{name: value})
    both(exclude_special_tokens=[], seqpos_slice=(None,))
    with pytest.raises(ValueError, match="saes is empty"):
        evaluate_many({}, random_model(), dataset_of(TOKENS))


# Stored and tabulated


def two_results() -> dict[str, Evaluation]:
    saes = {"plain": make_sae(), "topk": training_sae("topk")}
    return {name: evaluate(sae, random_model(), dataset_of(TOKENS), **sizes()) for name, sae in saes.items()}


def test_an_evaluation_survives_json() -> None:
    stored: dict[str, Any] = {}
    for result in two_results().values():
        stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert Evaluation.from_dict(stored) == Evaluation.from_dict(result.to_dict()) == result
        assert stored["ce_loss_increase"] == result.ce_loss_increase
        assert stored["downstream_mse"] == result.downstream_mse
    del stored["kl"], stored["l0"]
    with pytest.raises(ValueError, match="it has no kl, l0"):
        Evaluation.from_dict(stored)


def test_an_evaluation_stored_by_an_earlier_version_is_read() -> None:
    """Sweeps store these: where this fails, `tests/golden/make_evaluation.py` makes the file anew, and CHANGELOG says so."""
    stored = json.loads((GOLDEN / "evaluation.json").read_text())
    # Then there were no transcoders.
    assert Evaluation.from_dict(stored).to_dict() == stored | {"hook_name_out": None}


def test_frames_are_tidy() -> None:
    results = two_results()
    table = evaluation_frame(results)
    assert table.columns[0] == "sae"
    assert list(table["sae"]) == ["plain", "topk"]
    assert table.set_index("sae").loc["topk", "k"] == 2
    assert pd.isna(table.set_index("sae").loc["plain", "k"])
    for name, result in results.items():
        row: Any = table.set_index("sae").loc[name]
        for column in ("ce_loss_increase", "ce_loss_score", "kl", "l0", "fraction_alive", "n_tokens", "d_sae"):
            assert row[column] == getattr(result, column)
        assert row["explained_variance"] == result.at_hook.explained_variance
    assert all(pd.api.types.is_scalar(value) or value is None for value in table.to_numpy().flatten())

    layers = layers_frame(results)
    assert list(layers.columns[:3]) == ["sae", "hook", "layer"]
    assert list(layers["hook"]) == [HOOK, *LATER] * 2
    assert list(layers["layer"]) == [0, 1, 2] * 2
    last: Any = layers.iloc[-1]
    assert {name: last[name] for name in asdict(results["topk"].at_hook)} == asdict(results["topk"].layers[LATER[-1]])

    firing = firing_frame(results)
    for name, d_sae in (("plain", 40), ("topk", 128)):
        assert firing[firing["sae"] == name]["n_features"].sum() == d_sae
    first: Any = firing.iloc[0]
    assert first["log10_low"] == float("-inf")
    assert first["n_features"] == results["plain"].firing.n_never >= 3
    assert bool((firing["log10_low"] < firing["log10_high"]).all())
