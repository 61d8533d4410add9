"""KL without logits against KL from all of them: values, gradients, precision and peak memory."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lens_e2e.splice import unembedding as module
from sae_lens_e2e.splice.unembedding import LinearHead, LogitsHead, linear_kl

N_TOKENS, D_MODEL, D_VOCAB = 13, 6, 37
SOFT_CAP = 1.5
BUFFER_ROWS = (1, 2, 5, 12, 13, 14, 1000)


def naive_kl(
    spliced: Tensor,
    clean: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """The definition: all logits, both log-softmaxes, Σ p (log p - log q)."""

    def log_softmax(hidden: Tensor) -> Tensor:
        logits = hidden @ weight if bias is None else hidden @ weight + bias
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        return logits.log_softmax(-1)

    log_p, log_q = log_softmax(clean), log_softmax(spliced)
    per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    return per_token.mean() if token_weights is None else token_weights @ per_token


def problem(
    n_tokens: int = N_TOKENS, d_model: int = D_MODEL, d_vocab: int = D_VOCAB, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Hidden states and an unembedding whose logits are several nats apart; weights that are no mean."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "spliced": normal(n_tokens, d_model),
        "clean": normal(n_tokens, d_model),
        "weight": normal(d_model, d_vocab),
        "bias": normal(d_vocab),
        "token_weights": torch.rand(n_tokens, generator=generator, dtype=torch.float64).to(dtype),
    }


def chunk_bytes(rows: int, dtype: torch.dtype = torch.float64) -> int:
    """The budget with which that many tokens are worked through at a time."""
    return rows * module.N_BUFFERS * D_VOCAB * dtype.itemsize


def value_and_gradient(kl: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    spliced = arguments["spliced"].clone().requires_grad_()
    value = kl(**(arguments | {"spliced": spliced}))
    # A factor behind the loss, as any objective has one.
    (3 * value).backward()
    assert spliced.grad is not None
    return value.detach(), spliced.grad


@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "token-weights"])
@pytest.mark.parametrize("soft_cap", [None, SOFT_CAP])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradient_are_those_of_the_definition(
    dtype: torch.dtype, rtol: float, with_bias: bool, soft_cap: float | None, weighted: bool
) -> None:
    arguments: dict[str, Any] = problem(dtype=dtype) | {"soft_cap": soft_cap}
    if not with_bias:
        arguments["bias"] = None
    if not weighted:
        arguments["token_weights"] = None
    value, gradient = value_and_gradient(linear_kl, arguments)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    expected, expected_gradient = value_and_gradient(naive_kl, exact)
    assert value.dtype == gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("soft_cap", [None, SOFT_CAP])
@pytest.mark.parametrize("rows", BUFFER_ROWS)
def test_chunks_of_every_size_add_up_to_the_whole(rows: int, soft_cap: float | None) -> None:
    arguments: dict[str, Any] = problem() | {"soft_cap": soft_cap}
    assert module.chunk_size(D_VOCAB, torch.float64, torch.device("cpu"), chunk_bytes(rows)) == rows
    value, gradient = value_and_gradient(linear_kl, arguments | {"chunk_bytes": chunk_bytes(rows)})
    expected, expected_gradient = value_and_gradient(naive_kl, arguments)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_a_budget_below_one_token_takes_one_at_a_time() -> None:
    arguments = problem()
    torch.testing.assert_close(linear_kl(**arguments, chunk_bytes=1), naive_kl(**arguments), rtol=1e-12, atol=0)


@pytest.mark.parametrize("soft_cap", [None, SOFT_CAP])
def test_gradcheck(soft_cap: float | None) -> None:
    p = problem(n_tokens=5, d_vocab=11)

    def loss(spliced: Tensor) -> Tensor:
        budget = 2 * module.N_BUFFERS * 11 * 8
        return linear_kl(spliced, p["clean"], p["weight"], p["bias"], soft_cap, p["token_weights"], budget)

    assert torch.autograd.gradcheck(loss, p["spliced"].requires_grad_())


def test_only_the_spliced_states_get_a_gradient() -> None:
    arguments = {name: tensor.requires_grad_() for name, tensor in problem().items()}
    linear_kl(**arguments).backward()
    assert [name for name, tensor in arguments.items() if tensor.grad is not None] == ["spliced"]


def test_nothing_to_differentiate_without_a_spliced_state_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_backward(monkeypatch)
    arguments = problem()
    assert not linear_kl(**arguments).requires_grad
    assert not calls
    linear_kl(**(arguments | {"spliced": arguments["spliced"].requires_grad_()}))
    assert calls  # what is counted is what forms the gradient


def test_no_gradient_is_formed_under_no_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_backward(monkeypatch)
    arguments = problem()
    arguments["spliced"].requires_grad_()
    with torch.no_grad():
        value = linear_kl(**arguments)
    assert not value.requires_grad
    torch.testing.assert_close(value, naive_kl(**arguments).detach(), rtol=1e-12, atol=0)
    assert not calls


def counted_backward(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    original = module._Logits.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        calls.append(None)
        original(*args, **kwargs)

    monkeypatch.setattr(module._Logits, "backward", backward)
    return calls


@pytest.mark.parametrize("soft_cap", [None, SOFT_CAP])
def test_low_precision_weights_are_summed_in_float32(soft_cap: float | None) -> None:
    # Wide enough that 4,096 probabilities added up in bfloat16 would be off by far more than the logits' own rounding.
    p = problem(n_tokens=64, d_model=16, d_vocab=4096, dtype=torch.bfloat16)
    p["weight"] = p["weight"] / 4
    p.pop("token_weights")
    arguments: dict[str, Any] = p | {"soft_cap": soft_cap}
    value, gradient = value_and_gradient(linear_kl, arguments)
    exact = {k: v.float() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    expected, expected_gradient = value_and_gradient(naive_kl, exact)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=0)
    assert float((gradient.float() - expected_gradient).norm() / expected_gradient.norm()) < 1e-2


def test_autocast_does_not_lower_the_precision() -> None:
    arguments = problem(n_tokens=64, d_model=16, d_vocab=512, dtype=torch.float32)
    expected, expected_gradient = value_and_gradient(naive_kl, {k: v.double() for k, v in arguments.items()})
    with torch.autocast("cpu", torch.bfloat16):
        assert (arguments["spliced"] @ arguments["weight"]).dtype == torch.bfloat16  # autocast is in force
        value, gradient = value_and_gradient(linear_kl, arguments)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert float((gradient.double() - expected_gradient).norm() / expected_gradient.norm()) < 1e-5


@pytest.mark.parametrize("soft_cap", [None, SOFT_CAP])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_distributions_have_no_divergence_and_no_gradient(dtype: torch.dtype, soft_cap: float | None) -> None:
    arguments: dict[str, Any] = problem(dtype=dtype) | {"soft_cap": soft_cap}
    arguments["spliced"] = arguments["clean"].clone()
    value, gradient = value_and_gradient(linear_kl, arguments)
    assert float(value) == 0
    assert not gradient.any()


def test_logits_far_apart_stay_finite() -> None:
    p = problem(dtype=torch.float32)
    far = p | {"spliced": 200 * p["spliced"], "clean": 200 * p["clean"]}
    value, gradient = value_and_gradient(linear_kl, far)
    expected, _ = value_and_gradient(naive_kl, {k: v.double() for k, v in far.items()})
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("head_kind", ["linear", "logits"])
def test_no_tokens(head_kind: str) -> None:
    p = problem(n_tokens=0)
    head: LinearHead | LogitsHead = LinearHead(p["weight"], p["bias"])
    if head_kind == "logits":
        head = LogitsHead(lambda h: h @ p["weight"] + p["bias"], D_VOCAB)
    value, gradient = value_and_gradient(head.kl, {k: p[k] for k in ("spliced", "clean", "token_weights")})
    assert float(value) == 0
    assert gradient.shape == (0, D_MODEL)


def test_default_token_weights_of_no_tokens() -> None:
    p = problem(n_tokens=0)
    assert float(linear_kl(p["spliced"], p["clean"], p["weight"])) == 0


# LogitsHead: any function from hidden states to logits


def nonlinear_logits(p: dict[str, Tensor]) -> Any:
    def logits(hidden: Tensor) -> Tensor:
        return torch.nn.functional.gelu(hidden) @ p["weight"] * 0.7 + p["bias"]

    return logits


@pytest.mark.parametrize("rows", [*BUFFER_ROWS, None])
def test_logits_head_is_the_definition_in_chunks_of_every_size(
    monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    if rows is not None:
        monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk_bytes(rows, torch.float32))
    p = problem()
    logits, sizes = nonlinear_logits(p), []

    def counted(hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return logits(hidden)

    identity = torch.eye(D_VOCAB, dtype=torch.float64)

    def expected_kl(spliced: Tensor, clean: Tensor, token_weights: Tensor) -> Tensor:
        return naive_kl(logits(spliced), logits(clean), identity, token_weights=token_weights)

    states = {k: p[k] for k in ("spliced", "clean", "token_weights")}
    value, gradient = value_and_gradient(LogitsHead(counted, D_VOCAB).kl, states)
    expected, expected_gradient = value_and_gradient(expected_kl, states)
    assert max(sizes) == min(rows or N_TOKENS, N_TOKENS)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_logits_head_builds_no_graph_for_the_teacher_or_under_no_grad() -> None:
    p = problem()
    differentiated: list[bool] = []

    def logits(hidden: Tensor) -> Tensor:
        differentiated.append(torch.is_grad_enabled() and hidden.requires_grad)
        return hidden @ p["weight"]

    spliced, clean = p["spliced"].requires_grad_(), p["clean"].requires_grad_()
    LogitsHead(logits, D_VOCAB).kl(spliced, clean, p["token_weights"]).backward()
    assert clean.grad is None
    assert sorted(differentiated) == [False, True]
    differentiated.clear()
    with torch.no_grad():
        LogitsHead(logits, D_VOCAB).kl(spliced, clean, p["token_weights"])
    assert differentiated == [False, False]


def test_logits_head_leaves_the_weights_without_gradient() -> None:
    p = problem()
    weight = p["weight"].requires_grad_()
    head = LogitsHead(lambda h: h @ weight, D_VOCAB)
    head.kl(p["spliced"].requires_grad_(), p["clean"], p["token_weights"]).backward()
    assert weight.grad is None


@pytest.mark.parametrize("soft_cap", [None, SOFT_CAP])
def test_the_two_heads_agree(soft_cap: float | None) -> None:
    p = problem()

    def logits(hidden: Tensor) -> Tensor:
        plain = hidden @ p["weight"] + p["bias"]
        return plain if soft_cap is None else soft_cap * torch.tanh(plain / soft_cap)

    states = {k: p[k] for k in ("spliced", "clean", "token_weights")}
    linear = value_and_gradient(LinearHead(p["weight"], p["bias"], soft_cap).kl, states)
    general = value_and_gradient(LogitsHead(logits, D_VOCAB).kl, states)
    torch.testing.assert_close(linear, general, rtol=1e-12, atol=1e-12)


# Memory

MEASURE = """
import importlib.util, json, re, sys
from pathlib import Path
import torch

# The one file, as it needs torch only: importing SAELens takes longer than all the rest.
spec = importlib.util.spec_from_file_location("linear_kl", sys.argv[1])
linear_kl = sys.modules["linear_kl"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(linear_kl)
assert "sae_lens" not in sys.modules

D_MODEL, D_VOCAB, N_TOKENS = 16, 50_257, 2048
torch.manual_seed(0)
weight = torch.randn(D_MODEL, D_VOCAB)
heads = {
    "linear": linear_kl.LinearHead(weight, torch.randn(D_VOCAB)),
    "logits": linear_kl.LogitsHead(lambda h: h @ weight, D_VOCAB),
}
token_weights = torch.full((N_TOKENS,), 1 / N_TOKENS)

def peak():
    # Not getrusage: its peak is inherited from the parent process, which is larger.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

def run(head, n_tokens):
    spliced = torch.randn(n_tokens, D_MODEL, requires_grad=True)
    head.kl(spliced, torch.randn(n_tokens, D_MODEL), token_weights[:n_tokens]).backward()

run(heads["linear"], 2)  # what the first call loads is no part of it
start, growth = peak(), {}
for name, head in heads.items():
    before = peak()
    run(head, N_TOKENS)
    growth[name] = peak() - before
torch.ones(N_TOKENS, D_VOCAB)
growth["and one logits tensor"] = peak() - start
print(json.dumps(growth))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc to ask for the peak resident size")
def test_peak_memory_is_a_few_chunks() -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(module.__file__)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    growth = json.loads(run.stdout)
    one_logits_tensor = 2048 * 50_257 * 4
    assert growth["and one logits tensor"] > 0.95 * one_logits_tensor  # the measurement sees what it should
    assert growth["linear"] < 150e6
    assert growth["logits"] < one_logits_tensor / 2
