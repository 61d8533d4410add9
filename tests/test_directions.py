"""Principal directions, how they are reconstructed and what resampling them costs, against the same written out."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import GPT2Config, GPT2LMHeadModel

from sae_lens_e2e import embedded
from sae_lens_e2e.splice import Clean, Replace, Site, Spliced, SplicedModel, Where
from sae_lens_e2e.studies.directions import (
    Directions,
    ablation_kl,
    default_directions,
    directions_frame,
    measure_directions,
    pca,
)
from tests.models import dataset_of, random_model, random_tokens

HOOK, HOOK_Z = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"
TOKENS = random_tokens(10, 12, 61)


def sae_at(hook_name: str = HOOK, d_in: int = 16, dtype: str = "float32", **metadata: Any) -> StandardSAE:
    torch.manual_seed(0)
    reshape = "hook_z" if hook_name == HOOK_Z else "none"
    about = SAEMetadata(hook_name=hook_name, **metadata)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=40, dtype=dtype, reshape_activations=reshape, metadata=about))
    with torch.no_grad():
        sae.b_dec.add_(0.3 * torch.randn(d_in))
    return sae


def projector(kept: Tensor, hook_name: str = HOOK) -> StandardSAE:
    """An SAE that gives back what lies along the rows of `kept` (n, d_in), orthonormal, and nothing else."""
    n, d_in = kept.shape
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=2 * n, metadata=SAEMetadata(hook_name=hook_name)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([kept, -kept]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def activations(model: HookedTransformer, tokens: Tensor = TOKENS, hook: str = HOOK) -> Tensor:
    with torch.no_grad():
        return model.run_with_cache(tokens)[1][hook]


def naive_pca(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Directions (rows) and variances by singular value decomposition of all centred activations."""
    centred = x.double().numpy() - x.double().numpy().mean(0)
    _, s, directions = np.linalg.svd(centred, full_matrices=False)
    return directions, s**2 / (len(centred) - 1)


def naive_kl(clean_logits: Tensor, ablated_logits: Tensor) -> Tensor:
    """KL(clean ‖ ablated) of each token."""
    p, q = clean_logits.double().softmax(-1), ablated_logits.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


@contextmanager
def recorded(splice: SplicedModel, hook: str) -> Iterator[list[Tensor]]:
    """The activations at a hook in every spliced pass, after what is put in there."""
    put_in, spliced = [], splice.spliced

    def recording(clean: Clean, where: Where, replace: Mapping[Site, Replace]) -> Spliced:
        found = spliced(clean, where, replace, [hook])
        put_in.append(found.at[hook])
        return found

    splice.spliced = recording  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield put_in
    finally:
        splice.spliced = spliced


@pytest.mark.parametrize("sizes", [[300], [1, 1, 298], [0, 7, 93, 200]], ids=str)
def test_pca_in_batches_is_that_of_the_whole(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator, dtype=torch.float64) @ torch.randn(
        12, 12, generator=generator, dtype=torch.float64
    )
    x += 1e6  # beside which the variance is lost if sums of squares are kept
    found = pca(x.split(sizes))
    directions, variance = naive_pca(x)
    assert found.n_tokens == 300
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.variance, torch.from_numpy(variance), rtol=1e-6, atol=0)
    along = (found.directions @ torch.from_numpy(directions).T).abs()
    torch.testing.assert_close(along, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)
    largest = found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


def test_pca_of_low_precision_and_of_fewer_activations_than_dimensions() -> None:
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = pca(x.split(2))
    assert found.directions.dtype == torch.float64
    torch.testing.assert_close(found.variance[:5], torch.from_numpy(naive_pca(x)[1]), rtol=1e-9, atol=1e-12)
    assert bool((found.variance[4:] < 1e-12).all())
    assert bool((found.variance >= 0).all())
    identity = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(found.directions @ found.directions.T, identity, rtol=0, atol=1e-9)


def test_pca_needs_activations_that_differ_and_are_numbers() -> None:
    with pytest.raises(ValueError, match="of 0 tokens"):
        pca([])
    with pytest.raises(ValueError, match="of 4 tokens none differ"):
        pca([torch.ones(4, 3)])
    with pytest.raises(ValueError, match="not all finite"):
        pca([torch.ones(4, 3), torch.full((1, 3), torch.inf)])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"exclude_special_tokens": [1, 2, 3, 4, 5, 6, 7]},
        {"seqpos_slice": [2, -1]},
        {"seqpos_slice": (0, 10, 2), "exclude_special_tokens": [8, 9, 10]},
    ],
    ids=str,
)
def test_every_figure_is_its_definition(settings: dict[str, Any]) -> None:
    model, sae = random_model(), sae_at(**settings)
    found = measure_directions(sae, model, TOKENS, batch_size_prompts=3, n_kl_prompts=4, directions=range(16))

    mask = torch.zeros(TOKENS.shape, dtype=torch.bool)
    mask[:, slice(*settings.get("seqpos_slice", (None,)))] = True
    mask &= ~torch.isin(TOKENS, torch.tensor(settings.get("exclude_special_tokens", [])))
    later = mask.clone()
    later[:, 0] = False
    x = activations(model)
    with torch.no_grad():
        x_hat = sae(x)
    directions, variance = naive_pca(x[mask])
    assert found.hook_name == HOOK
    assert found.index == tuple(range(16))
    assert found.n_tokens == int(mask.sum()) > 40
    assert found.n_kl_tokens == int(later[:4].sum())
    assert found.explained_variance == pytest.approx(variance / variance.sum(), rel=1e-6)
    for i, direction in enumerate(directions):
        v = direction * np.sign(direction[np.abs(direction).argmax()])
        a, b = x[later].double().numpy() @ v, x_hat[later].double().numpy() @ v
        assert found.correlation[i] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
        assert found.mean_later[i] == pytest.approx(a.mean(), abs=1e-5)
        if mask[:, 0].any():
            at_0 = x[:, 0][mask[:, 0]].double().numpy() @ v
            assert found.mean_at_0[i] == pytest.approx(at_0.mean(), abs=1e-5)
        else:
            assert found.mean_at_0[i] is None


def test_resampling_exchanges_one_coordinate_among_the_counted_tokens_and_is_measured_in_kl() -> None:
    model = random_model()
    splice, site = SplicedModel(model), Site.of_sae(HOOK)
    mask = ~torch.isin(TOKENS, torch.arange(8))
    mask[:, 9:] = False
    counted = mask.clone()
    counted[:, 0] = False
    components = pca([activations(model)[mask]])
    prompts = [(TOKENS[:4], Where(mask[:4])), (TOKENS[4:], Where(mask[4:]))]
    with recorded(splice, HOOK) as put_in:
        kl, n_tokens = ablation_kl(splice, site, prompts, components.directions[[0, 5]], seed=1)
    assert n_tokens == int(counted.sum())
    x = torch.cat([splice.clean(tokens, [site]).at[HOOK] for tokens, _ in prompts])
    torch.testing.assert_close(x, activations(model))
    clean_logits = model(TOKENS).detach()
    for found, direction, ablated in zip(
        kl, components.directions[[0, 5]], (torch.cat(put_in[:2]), torch.cat(put_in[2:])), strict=True
    ):
        assert torch.equal(ablated[~counted], x[~counted])
        moved = (ablated - x)[counted].double()
        torch.testing.assert_close(moved, (moved @ direction)[:, None] * direction, rtol=0, atol=1e-5)
        before, after = (y[counted].double() @ direction for y in (x, ablated))
        torch.testing.assert_close(after.sort().values, before.sort().values, rtol=0, atol=1e-5)
        assert float((after - before).abs().min()) > 1e-5  # nobody keeps its own
        with torch.no_grad():
            logits = model.run_with_hooks(TOKENS, fwd_hooks=[(HOOK, lambda _, hook, put=ablated: put)])  # noqa: ARG005
        expected = naive_kl(clean_logits, logits)
        assert found == pytest.approx(float(expected[counted].mean()), rel=1e-4)
        assert float(found or 0) > 1e-3
        # It is the mean of the counted tokens, and the clean distribution comes first.
        assert found != pytest.approx(float(expected.mean()), rel=1e-3)
        assert found != pytest.approx(float(naive_kl(logits, clean_logits)[counted].mean()), rel=1e-3)


def test_two_tokens_swap() -> None:
    model, sae = random_model(), sae_at(seqpos_slice=(4, 6))
    tokens = TOKENS[:1]
    found = measure_directions(sae, model, tokens, directions=[0, 1])
    x = activations(model, tokens)
    # Two activations differ in one direction only, so that exchanging it exchanges them.
    swapped = x.clone()
    swapped[:, [4, 5]] = x[:, [5, 4]]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda _, hook: swapped)])  # noqa: ARG005
        expected = naive_kl(model(tokens), logits)[0, 4:6].mean()
    assert found.kl == (pytest.approx(float(expected), rel=1e-4), pytest.approx(0, abs=1e-6))
    assert found.explained_variance == (pytest.approx(1), pytest.approx(0, abs=1e-9))
    # Along the second the activations do not differ, though their reconstructions do.
    assert abs(found.correlation[0] or 0) == pytest.approx(1)
    assert found.correlation[1] is None


def test_the_draw_does_not_depend_on_which_directions_are_measured_nor_on_the_batches() -> None:
    model, sae = random_model(), sae_at()
    every = measure_directions(sae, model, TOKENS, directions=range(16), n_kl_prompts=7)
    some = measure_directions(sae, model, TOKENS, directions=[9, 2], n_kl_prompts=7, batch_size_prompts=2)
    assert some.index == (9, 2)
    assert some.kl == (pytest.approx(every.kl[9], rel=1e-4), pytest.approx(every.kl[2], rel=1e-4))
    assert some.correlation == (pytest.approx(every.correlation[9]), pytest.approx(every.correlation[2]))
    other = measure_directions(sae, model, TOKENS, directions=[2], n_kl_prompts=7, seed=1)
    assert other.kl[0] != pytest.approx(every.kl[2], rel=1e-3)
    assert measure_directions(sae, model, TOKENS, directions=[2], n_kl_prompts=99).n_kl_tokens == 110
    without = measure_directions(sae, model, TOKENS, directions=[2], n_kl_prompts=0)
    assert (without.kl, without.n_kl_tokens) == ((None,), 0)
    assert without.correlation == (pytest.approx(every.correlation[2]),)


def test_what_an_sae_keeps_correlates_and_what_it_loses_does_not_vary() -> None:
    model = random_model()
    directions = pca([activations(model).flatten(0, 1)]).directions.float()
    kept = measure_directions(projector(directions[[0, 3]]), model, TOKENS, directions=range(5), n_kl_prompts=0)
    assert kept.correlation == (pytest.approx(1), None, None, pytest.approx(1), None)
    everything = measure_directions(projector(torch.eye(16)), model, TOKENS, n_kl_prompts=0)
    assert everything.correlation == pytest.approx((1.0,) * 16)
    dead = sae_at()
    dead.W_enc.data.zero_()
    dead.b_enc.data.fill_(-1)
    assert set(measure_directions(dead, model, TOKENS, n_kl_prompts=0).correlation) == {None}


@pytest.mark.parametrize("head", [None, 2], ids=["all-heads", "one-head"])
def test_heads(head: int | None) -> None:
    model = random_model()
    sae = sae_at(HOOK_Z, d_in=16 if head is None else 4, hook_head_index=head)
    found = measure_directions(sae, model, TOKENS, directions=[0, 1])
    assert sae.hook_z_reshaping_mode
    x = activations(model, hook=HOOK_Z)
    x = x.flatten(2) if head is None else x[:, :, head]
    directions, variance = naive_pca(x.flatten(0, 1))
    assert found.explained_variance == pytest.approx((variance / variance.sum())[:2], rel=1e-5)
    sae.turn_off_forward_pass_hook_z_reshaping()
    with torch.no_grad():
        a, b = (y[:, 1:].flatten(0, 1).double().numpy() @ directions[0] for y in (x, sae.decode(sae.encode(x))))
    assert found.correlation[0] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-5)
    assert found.kl[0] is not None
    assert found.kl[0] > 1e-4


def test_a_hugging_face_model() -> None:
    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, n_positions=16, vocab_size=61, initializer_range=0.4)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)  # in training mode, where it drops out
    proxy = HookedProxyLM(model, tokenizer=None)  # pyright: ignore[reportArgumentType]
    model.train()
    found = measure_directions(sae_at("transformer.h.0"), proxy, TOKENS, directions=[0, 15], n_kl_prompts=5)
    assert model.training
    model.eval()
    with torch.no_grad():
        x = model(TOKENS, output_hidden_states=True).hidden_states[1]
    directions, variance = naive_pca(x.flatten(0, 1))
    assert found.explained_variance == pytest.approx((variance / variance.sum())[[0, 15]], rel=1e-4)
    splice, hook = SplicedModel(proxy), "transformer.h.0"
    with recorded(splice, hook) as put_in:
        prompts = [(TOKENS[:5], Where.everywhere(TOKENS[:5]))]
        kl, _ = ablation_kl(splice, Site.of_sae(hook), prompts, torch.from_numpy(directions[:1]))

    def put(_module: Any, _args: Any, output: Any) -> Any:
        return (put_in[0], *output[1:]) if isinstance(output, tuple) else put_in[0]

    with torch.no_grad():
        clean = model(TOKENS[:5]).logits
        handle = model.transformer.h[0].register_forward_hook(put)
        ablated = model(TOKENS[:5]).logits
        handle.remove()
    expected = naive_kl(clean, ablated)
    assert float(expected[:, 0].abs().max()) < 1e-6
    assert kl[0] == pytest.approx(float(expected[:, 1:].mean()), rel=1e-3) == pytest.approx(found.kl[0], rel=1e-3)


def test_low_precision_is_resampled_in_float32() -> None:
    model = random_model(dtype=torch.bfloat16)
    splice, site, mask = SplicedModel(model), Site.of_sae(HOOK), torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [3, 8]] = True
    direction = torch.nn.functional.normalize(torch.arange(1.0, 17), dim=0)
    x = splice.clean(TOKENS[:1], [site]).at[HOOK]
    with recorded(splice, HOOK) as put_in:
        ablation_kl(splice, site, [(TOKENS[:1], Where(mask))], direction[None])
    expected = x.float()
    change = (expected[0, 8] - expected[0, 3]) @ direction
    expected[0, [3, 8]] += torch.stack([change * direction, -change * direction])
    assert put_in[0].dtype == torch.bfloat16
    torch.testing.assert_close(put_in[0], expected.bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.10"),
    reason="products in bfloat16 are coarser before PyTorch 2.10 on some CPUs",
)
def test_low_precision_changes_little() -> None:
    full = measure_directions(sae_at(), random_model(), TOKENS, directions=range(6))
    half = measure_directions(sae_at(dtype="bfloat16"), random_model(dtype=torch.bfloat16), TOKENS, directions=range(6))
    assert half.explained_variance == pytest.approx(full.explained_variance, rel=0.1)
    assert half.correlation == pytest.approx(full.correlation, abs=0.05)
    assert half.kl == pytest.approx(full.kl, rel=0.2)


def test_the_embedded_model_needs_its_first_directions_most() -> None:
    model, dataset = embedded.load_model(), embedded.load_dataset("held_out")
    sae = sae_at(embedded.HOOK_NAME, d_in=embedded.D_MODEL)
    found = measure_directions(sae, model, dataset.select(range(8)), n_kl_prompts=4, batch_size_prompts=4)
    assert found.index == tuple(default_directions(64))
    assert sorted(found.explained_variance, reverse=True) == list(found.explained_variance)
    kl = [value for value in found.kl if value is not None]
    assert len(kl) == len(found.index)
    assert kl[0] > 5 * kl[-1] > 0
    # Every prompt starts with the same token: position 0 lies apart.
    assert found.mean_at_0[0] != pytest.approx(found.mean_later[0], rel=0.5)
    # Its only special token is both that one and the end of a story.
    excluding = sae_at(embedded.HOOK_NAME, d_in=embedded.D_MODEL, exclude_special_tokens=True)
    without = measure_directions(excluding, model, dataset.select(range(8)), directions=[0], n_kl_prompts=0)
    tokens = torch.tensor(dataset.select(range(8))["input_ids"][:])
    assert without.n_tokens == int((tokens != tokens[0, 0]).sum()) < 8 * 256
    assert without.mean_at_0 == (None,)


def test_tokens_come_in_any_form() -> None:
    model, sae = random_model(), sae_at()
    expected = measure_directions(sae, model, TOKENS, directions=[0, 7], batch_size_prompts=4)
    with_text = dataset_of(TOKENS).add_column("text", ["x"] * 10)  # pyright: ignore[reportCallIssue]
    for tokens in (dataset_of(TOKENS), with_text, iter(TOKENS.split(4)), list(TOKENS.int().split(4))):
        assert measure_directions(sae, model, tokens, directions=[0, 7], batch_size_prompts=4) == expected
    both = Dataset.from_dict({"input_ids": TOKENS.flip(0).tolist(), "tokens": TOKENS.tolist()})
    assert measure_directions(sae, model, both, directions=[0, 7], batch_size_prompts=4) == expected
    shuffled = dataset_of(TOKENS).select([4, 2])
    assert measure_directions(sae, model, shuffled, directions=[0]).n_tokens == 24


def test_json_and_frame() -> None:
    model = random_model()
    found = {
        "a": measure_directions(sae_at(), model, TOKENS, directions=[0, 3]),
        "b": measure_directions(sae_at(seqpos_slice=(1, None)), model, TOKENS, directions=[1], n_kl_prompts=0),
    }
    for one in found.values():
        assert Directions.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False))) == one
    frame = directions_frame(found)
    assert list(frame.sae) == ["a", "a", "b"]
    assert list(frame.direction) == [0, 3, 1]
    assert set(frame.hook) == {HOOK}
    assert frame.loc[1, "correlation"] == found["a"].correlation[1]
    assert frame.loc[0, "kl"] == found["a"].kl[0]
    assert np.isnan(frame.loc[2, "kl"])
    assert np.isnan(frame.loc[2, "mean_at_0"])
    assert list(directions_frame({})) == list(frame)


@pytest.mark.parametrize(
    ("d_in", "first", "last"), [(3, 3, 2), (25, 25, 24), (26, 25, 25), (64, 25, 63), (768, 25, 767)]
)
def test_default_directions(d_in: int, first: int, last: int) -> None:
    found = default_directions(d_in)
    assert found[:first] == list(range(first))
    assert found[-1] == last
    assert len(set(found)) == len(found) <= 40
    assert sorted(found) == found


def test_errors_say_what_to_do() -> None:
    model = random_model()

    def fails(match: str, tokens: Any = TOKENS, sae: StandardSAE | None = None, **settings: Any) -> None:
        with pytest.raises(ValueError, match=match):
            measure_directions(sae or sae_at(), model, tokens, **settings)

    fails("hook_name is None", sae=sae_at(None))  # pyright: ignore[reportArgumentType]
    fails("has no hook 'blocks.7.hook_resid_pre'", sae=sae_at("blocks.7.hook_resid_pre"))
    scaled = sae_at()
    scaled.cfg.normalize_activations = "expected_average_only_in"
    fails("normalize_activations='expected_average_only_in'", sae=scaled)
    fails("sae.d_in=15 does not fit", sae=sae_at(d_in=15))
    fails(r"directions=\[0, 16\] must be different numbers from 0 to 15", directions=[0, 16])
    fails(r"directions=\[1, 1\]", directions=[1, 1])
    fails(r"directions=\[\]", directions=[])
    fails("n_kl_prompts=-1", n_kl_prompts=-1)
    fails("batch_size_prompts=0", batch_size_prompts=0)
    fails("prompts of 17 tokens exceed the model's context of 16", random_tokens(2, 17, 61))
    fails("no prompts", TOKENS[:0])
    fails("no prompts", iter([]))
    fails("rows of one length", Dataset.from_dict({"input_ids": [[1, 2], [3]]}))
    fails("ids in batches", TOKENS[0])
    fails("ids in batches", TOKENS.float())
    fails("holds text, in its column 'text'; tokenise it", Dataset.from_dict({"text": ["a"]}))
    fails("the columns label; name that of its tokens", Dataset.from_dict({"label": ["a"]}))
    fails("leave 0 tokens", sae=sae_at(exclude_special_tokens=list(range(61))))
    fails("needs the model's tokenizer", sae=sae_at(exclude_special_tokens=True))
