"""Products over active features against dense ones: every training architecture, and what falls back."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sae_lens_e2e  # noqa: F401 (registers the architectures that are ours)
from sae_lens_e2e.architectures import encoding, sparse_products, weighted_features
from sae_lens_e2e.architectures.sparse_products import ZERO_WHERE_OFF, SparseProducts
from sae_lens_e2e.architectures.transcoder import TranscoderStepInput

D_IN, D_SAE, N_TOKENS = 24, 512, 40
SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.3},
    "gated": {"l1_coefficient": 0.3},
    "topk": {"k": 8},
    "batchtopk": {"k": 8},
    "matryoshka_batchtopk": {"k": 8, "matryoshka_widths": [32, 128]},
    # Thresholds and the band below them in which they get a gradient are wide enough for both to be there.
    "jumprelu": {"jumprelu_init_threshold": 2.0, "jumprelu_bandwidth": 0.5, "l0_coefficient": 0.1},
    "abstopk": {"k": 8},
    "apollo": {"sparsity_coefficient": 0.3},
    "transcoder": {"l1_coefficient": 0.3, "d_out": D_IN},
    "skip_transcoder": {"l1_coefficient": 0.3, "d_out": D_IN},
    "batchtopk_transcoder": {"k": 8, "d_out": D_IN},
    "jumprelu_transcoder": {"d_out": D_IN, "jumprelu_init_threshold": 2.0, "jumprelu_bandwidth": 0.5},
}
FEW = ("standard", "gated", "apollo", "transcoder", "skip_transcoder")
"""Those that need a bias for few of their features to fire."""
STRAIGHT = ("standard", "transcoder", "skip_transcoder")
"""Those whose gradient goes from the features that are on straight to the encoder, so that nothing has to be looked through for it."""


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_products, "MIN_FEATURES", 100)
    monkeypatch.setattr(sparse_products, "MIN_WIDTH", 8)


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each product that was looked at had few features."""
    found: list[bool] = []
    inner = sparse_products.as_csr_if_few

    def counted(x: Tensor) -> Tensor | None:
        features = inner(x)
        found.append(features is not None)
        return features

    with monkeypatch.context() as patch:
        for module in (sparse_products, encoding):
            patch.setattr(module, "as_csr_if_few", counted)
        yield found


def make_sae(architecture: str, dtype: str = "float64") -> TrainingSAE[Any]:
    torch.manual_seed(0)
    training_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    sae = training_class(config_class(d_in=D_IN, d_sae=D_SAE, dtype=dtype, **SETTINGS[architecture]))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.startswith("W_"):
                parameter.copy_(torch.randn_like(parameter) / D_IN**0.5)
            elif name in ("b_enc", "b_gate") and architecture in FEW:
                parameter.fill_(-2.3)
    return sae.train()


def of_pass(sae: TrainingSAE[Any], sparse: bool, x: Tensor, of_x: bool = True) -> dict[str, Tensor]:
    """Losses, output, and the gradients of all, the input's among them, if it is to have one."""
    x = x.clone().requires_grad_(of_x)
    given: dict[str, Any] = {
        "sae_in": x,
        "dead_neuron_mask": torch.arange(D_SAE) % 3 == 0,
        "coefficients": dict.fromkeys(sae.get_coefficients(), 1.0),
        "n_training_steps": 3,
        "is_logging_step": False,
    }
    step_input = TranscoderStepInput(**given, target=x.detach().flip(0)) if hasattr(sae.cfg, "d_out") else None
    if sparse:
        with SparseProducts.of(sae.cfg):
            output = sae.training_forward_pass(step_input or TrainStepInput(**given))
    else:
        output = sae.training_forward_pass(step_input or TrainStepInput(**given))
    # Something of the output too, as the language model behind it gives it a gradient.
    (output.loss + (output.sae_out**3).mean()).backward()
    gradients = {name: parameter.grad for name, parameter in sae.named_parameters()}
    if of_x:
        gradients["x"] = x.grad
    return {"loss": output.loss, "output": output.sae_out, **gradients}  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("of_x", [True, False], ids=["of-the-input-too", "of-weights"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("architecture", SETTINGS)
def test_losses_and_gradients_are_the_dense_ones(
    architecture: str, dtype: str, of_x: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(N_TOKENS, D_IN, generator=torch.Generator().manual_seed(1), dtype=getattr(torch, dtype))
    dense = of_pass(make_sae(architecture, dtype), False, x, of_x)
    with counting(monkeypatch) as looked:
        found = of_pass(make_sae(architecture, dtype), True, x, of_x)
    assert looked.count(True) >= (1 if architecture in STRAIGHT else 2), "nothing was sparse"
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    for name, expected in dense.items():
        assert expected is not None, name
        assert found[name].layout == torch.strided
        torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance, msg=name)


def test_a_penalty_goes_over_active_features_and_norms_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SAELens' own `standard` SAE asks for them."""
    calls: list[str] = []
    for owner, name in ((weighted_features._L1, "apply"), (sparse_products, "row_norms")):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, inner=inner, name=name: (calls.append(name), inner(*given))[1])
    of_pass(make_sae("standard"), True, torch.randn(N_TOKENS, D_IN, dtype=torch.float64))
    assert calls == ["row_norms", "apply"]


def test_a_gradient_is_formed_for_all_features_once_and_past_the_relu() -> None:
    """However much is made of them: a decoder's output, and a penalty."""
    sae, sums = make_sae("standard"), []
    with SparseProducts.of(sae.cfg):
        features, pre = sae.encode_with_hidden_pre(torch.randn(N_TOKENS, D_IN, dtype=torch.float64))
        pre.register_hook(lambda grad: sums.append(int((grad != 0).sum())))
        features.register_hook(lambda _: pytest.fail("a gradient went through the ReLU"))
        error = sae.decode(features).square().mean()
        penalty = (features * sae.W_dec.norm(dim=1)).norm(p=1, dim=-1).mean()
    (error + penalty).backward()
    assert sums == [int((features != 0).sum())]


def nodes_behind(value: Tensor) -> set[str]:
    """The names of all operations that a value's gradient goes through."""
    found, waiting = set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.mark.parametrize("architecture", STRAIGHT)
def test_no_gradient_of_all_features_is_formed(architecture: str) -> None:
    sae = make_sae(architecture)
    with SparseProducts.of(sae.cfg):
        features, _ = sae.encode_with_hidden_pre(torch.randn(N_TOKENS, D_IN, dtype=torch.float64))
        error = sae.decode(features).square().mean()
        penalty = (features * sae.W_dec.norm(dim=1)).norm(p=1, dim=-1).mean()
    behind = nodes_behind(error + penalty)
    assert "_EncodedValuesBackward" in behind
    assert not behind & {"ReluBackward0", "_ProductBackward", "_PreActivationsBackward", "_ValuesBackward"}


def test_a_penalty_forms_no_product_of_all_features() -> None:
    formed: list[str] = []

    class Formed(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.shape == (N_TOKENS, D_SAE) and found.layout == torch.strided:
                formed.append(str(func))
            return found

    sae = make_sae("standard")
    features = torch.relu(torch.randn(N_TOKENS, D_SAE, dtype=torch.float64) - 2.3).requires_grad_()
    with SparseProducts.of(sae.cfg):
        sae.decode(features)
        with Formed():
            (features * sae.W_dec.norm(dim=1)).norm(p=1, dim=-1)
    assert "aten.mul.Tensor" not in formed


@pytest.mark.parametrize("changed", ["centred", "product", "biased"])
def test_what_is_done_in_place_on_the_way_has_its_gradient(changed: str) -> None:
    gradients: list[tuple[Tensor, ...]] = []
    for products in (SparseProducts(True), nullcontext()):
        torch.manual_seed(1)
        sae, x = make_sae("standard"), torch.randn(N_TOKENS, D_IN, dtype=torch.float64) / 3
        leaves = (sae.b_dec, sae.W_enc, sae.get_parameter("b_enc"), sae.W_dec)

        def step(name: str, made: Tensor) -> Tensor:
            return made.mul_(3.0) if name == changed else made

        with products:
            product = step("product", step("centred", x - leaves[0]) @ leaves[1])
            out = torch.relu(step("biased", product + leaves[2])) @ leaves[3]
        gradients.append(torch.autograd.grad((out**2).sum(), leaves))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_features_that_were_changed_since_they_were_decoded_have_the_penalty_of_what_they_are() -> None:
    sae = make_sae("standard")
    with SparseProducts.of(sae.cfg):
        features = sae.encode(torch.randn(N_TOKENS, D_IN, dtype=torch.float64)).detach()
        sae.decode(features)
        features.mul_(2.0)
        found = (features * sae.W_dec.norm(dim=1)).norm(p=1, dim=-1)
    torch.testing.assert_close(found, (features * sae.W_dec.norm(dim=1)).norm(p=1, dim=-1), rtol=1e-12, atol=1e-12)


class Doubled(torch.autograd.Function):
    """What an architecture of somebody else's may do to a product at once, without a bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] * 2


def test_an_autograd_function_of_an_architecture_that_is_not_known_has_its_gradient() -> None:
    gradients: list[tuple[Tensor, ...]] = []
    for products in (SparseProducts(False), nullcontext()):
        sae, x = make_sae("standard"), torch.ones(N_TOKENS, D_IN, dtype=torch.float64) / 3
        with products:
            out: Any = Doubled.apply(x @ sae.W_enc)
        gradients.append(torch.autograd.grad((out**2).sum(), sae.W_enc))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of_x", [True, False])
def test_a_centre_has_a_row_of_gradient_where_it_alone_has_one(of_x: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor | None] = []
    inner = encoding._PreActivations.apply
    monkeypatch.setattr(encoding._PreActivations, "apply", lambda *of: (taken.append(of[2]), inner(*of))[1])
    of_pass(make_sae("standard"), True, torch.randn(N_TOKENS, D_IN, dtype=torch.float64), of_x)
    assert [None if centre is None else centre.shape for centre in taken] == [None if of_x else (D_IN,)]


@pytest.mark.parametrize("architecture", ["jumprelu", "jumprelu_transcoder"])
def test_a_threshold_gets_its_gradient_from_features_that_are_off(architecture: str) -> None:
    """Formed for those that are on only, it would be another: so these are no architectures in `ZERO_WHERE_OFF`."""
    assert architecture not in ZERO_WHERE_OFF
    x = torch.randn(N_TOKENS, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sae = make_sae(architecture)
    (threshold,) = (name for name, _ in sae.named_parameters() if "threshold" in name)
    expected = of_pass(make_sae(architecture), False, x)[threshold]
    sae.cfg.architecture = lambda: "standard"
    assert not torch.allclose(of_pass(sae, True, x)[threshold], expected)


def test_inputs_that_are_more_than_the_features_all_have_their_gradient() -> None:
    """An SAE of few features, on activations that are mostly zero: its encoder's product has the wide side that a decoder's has."""
    cfg = TopKTrainingSAEConfig(d_in=D_SAE, d_sae=D_IN, k=4, dtype="float64")
    torch.manual_seed(0)
    sae = TopKTrainingSAE(cfg)
    x = torch.zeros(N_TOKENS, D_SAE, dtype=torch.float64)
    x[:, ::40] = torch.randn(N_TOKENS, len(range(0, D_SAE, 40)), dtype=torch.float64)
    gradients = []
    for products in (SparseProducts.of(cfg), nullcontext()):
        given = x.clone().requires_grad_()
        with products:
            pre = given @ sae.W_enc
        (pre**2).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert int((gradients[0] != 0).sum()) > int((x != 0).sum())


def test_where_many_fire_the_products_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(N_TOKENS, D_IN, dtype=torch.float64)
    sae, same = make_sae("standard"), make_sae("standard")
    for one in (sae, same):
        torch.nn.init.zeros_(one.get_parameter("b_enc"))
    with counting(monkeypatch) as looked:
        found = of_pass(sae, True, x)
    assert looked
    assert not any(looked)
    for name, expected in of_pass(same, False, x).items():
        # The norms of rows have another gradient than PyTorch's in the last bit.
        torch.testing.assert_close(found[name], expected, rtol=1e-13, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions_are_left_to_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(4, 200).to(dtype), torch.randn(200, 16).to(dtype)
    with counting(monkeypatch) as looked, SparseProducts(True):
        assert torch.equal(left @ right, torch.mm(left, right))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (left.float() @ right.float()).dtype == torch.bfloat16
    assert not looked


def test_no_feature_at_all_and_no_token() -> None:
    right = torch.randn(200, 16, requires_grad=True)
    for left in (torch.zeros(5, 200), torch.zeros(0, 200)):
        left.requires_grad_()
        right.grad = None
        with SparseProducts(True):
            out = left @ right
        out.sum().backward()
        assert torch.equal(out, torch.zeros(len(left), 16))
        assert right.grad is not None
        assert not bool(right.grad.any())
        assert left.grad is not None
        assert left.grad.shape == left.shape
