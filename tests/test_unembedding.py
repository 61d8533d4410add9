"""Next-token figures without logits against all the logits: values, gradients, precision and peak memory."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sae_lens_e2e
from sae_lens_e2e.splice import NO_LABEL, Remembered, Site, SplicedModel, Where
from sae_lens_e2e.splice import unembedding as module
from sae_lens_e2e.splice.unembedding import LinearUnembedding, ModuleUnembedding, Unembedding, linear_kl
from tests.models import LOGIT_CAP, any_model, block_output, hugging_face_model, logits_of, random_model, random_tokens
from tests.pairwise import pairwise
from tests.processes import run_fresh

N_TOKENS, D_MODEL, D_VOCAB = 13, 6, 37
SOFT_CAP = 1.5
KINDS = ("linear", "module")
MEASURES = ("kl", "cross_entropy")
BUFFER_ROWS = (1, 2, 5, 12, 13, 14, 1000)
Problem = dict[str, Any]


def problem(
    n_tokens: int = N_TOKENS,
    d_model: int = D_MODEL,
    d_vocab: int = D_VOCAB,
    dtype: torch.dtype = torch.float64,
    with_bias: bool = True,
    soft_cap: float | None = None,
) -> Problem:
    """Hidden states and an unembedding whose logits are several nats apart; weights that are no mean; some have no label."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, d_vocab, (n_tokens,), generator=generator)
    labels[2::5] = NO_LABEL
    return {
        "hidden": normal(n_tokens, d_model),
        "clean": normal(n_tokens, d_model),
        "labels": labels,
        "weight": normal(d_model, d_vocab),
        "bias": normal(d_vocab) if with_bias else None,
        "soft_cap": soft_cap,
        "weights": torch.rand(n_tokens, generator=generator, dtype=torch.float64).to(dtype),
    }


def in_dtype(p: Problem, dtype: torch.dtype) -> Problem:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in p.items()}


def naive_logits(p: Problem, hidden: Tensor) -> Tensor:
    logits = hidden @ p["weight"]
    if p["bias"] is not None:
        logits = logits + p["bias"]
    return logits if p["soft_cap"] is None else p["soft_cap"] * torch.tanh(logits / p["soft_cap"])


def naive(measure: str, p: Problem, weighted: bool = False) -> Callable[[Tensor], Tensor]:
    """The definition, of all logits: Σ p (log p - log q), or -log q of the label, of those that have one."""

    def value(hidden: Tensor) -> Tensor:
        log_q = naive_logits(p, hidden).log_softmax(-1)
        if measure == "kl":
            log_p = naive_logits(p, p["clean"]).log_softmax(-1)
            counts = torch.ones(len(hidden), dtype=torch.bool)
            per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
        else:
            counts = p["labels"] != NO_LABEL
            per_token = torch.zeros(len(hidden), dtype=log_q.dtype)
            per_token[counts] = -log_q[counts, p["labels"][counts]]
        return per_token[counts].mean() if not weighted else (p["weights"] * per_token)[counts].sum()

    return value


def unembedding_of(kind: str, p: Problem, chunk_bytes: int | None = None) -> Unembedding:
    if kind == "linear":
        return LinearUnembedding(p["weight"], p["bias"], p["soft_cap"], chunk_bytes)
    return ModuleUnembedding(lambda hidden: naive_logits(p, hidden), p["weight"].shape[1])


def ours(measure: str, unembedding: Unembedding, p: Problem, weighted: bool = False) -> Callable[[Tensor], Tensor]:
    weights = p["weights"] if weighted else None
    if measure == "kl":
        return lambda hidden: unembedding.kl(hidden, p["clean"], weights)
    return lambda hidden: unembedding.cross_entropy(hidden, p["labels"], weights)


def value_and_gradient(function: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().clone().requires_grad_()
    value = function(hidden)
    # A factor behind the loss, as any objective has one.
    (3 * value).backward()
    assert hidden.grad is not None
    return value.detach(), hidden.grad


def chunk_bytes(rows: int, dtype: torch.dtype = torch.float64) -> int:
    """The budget with which that many tokens are worked through at a time."""
    return rows * module.N_BUFFERS * D_VOCAB * dtype.itemsize


@pytest.mark.parametrize(
    ("kind", "measure", "weighted", "soft_cap", "with_bias", "dtype"),
    pairwise(KINDS, MEASURES, (False, True), (None, SOFT_CAP), (False, True), (torch.float64, torch.float32)),
    ids=str,
)
def test_value_and_gradient_are_those_of_the_definition(
    kind: str, measure: str, weighted: bool, soft_cap: float | None, with_bias: bool, dtype: torch.dtype
) -> None:
    p = problem(dtype=dtype, with_bias=with_bias, soft_cap=soft_cap)
    value, gradient = value_and_gradient(ours(measure, unembedding_of(kind, p), p, weighted), p["hidden"])
    exact = in_dtype(p, torch.float64)
    expected, expected_gradient = value_and_gradient(naive(measure, exact, weighted), exact["hidden"])
    assert value.dtype == gradient.dtype == dtype
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("kind", "measure", "rows", "soft_cap"), pairwise(KINDS, MEASURES, BUFFER_ROWS, (None, SOFT_CAP)), ids=str
)
def test_chunks_of_every_size_add_up_to_the_whole(
    kind: str, measure: str, rows: int, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(soft_cap=soft_cap)
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk_bytes(rows))
    monkeypatch.setitem(module.CHUNK_ROWS, "narrow", 1)
    assert module.chunk_size(D_MODEL, D_VOCAB, torch.float64, torch.device("cpu")) == rows
    sizes: list[int] = []

    def counted(hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return naive_logits(p, hidden)

    unembedding = unembedding_of(kind, p) if kind == "linear" else ModuleUnembedding(counted, D_VOCAB)
    value, gradient = value_and_gradient(ours(measure, unembedding, p), p["hidden"])
    expected, expected_gradient = value_and_gradient(naive(measure, p), p["hidden"])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    if kind == "module":
        assert max(sizes) == min(rows, N_TOKENS)
    assert [rows_of.start for rows_of in unembedding.chunks(p["hidden"])] == list(range(0, N_TOKENS, rows))


def test_linear_kl_is_the_unembeddings_as_a_function() -> None:
    p = problem(soft_cap=SOFT_CAP)
    given = (p["hidden"], p["clean"], p["weight"], p["bias"], SOFT_CAP, p["weights"])
    expected = naive("kl", p, weighted=True)(p["hidden"])
    for budget in (None, chunk_bytes(5), 1):  # a budget below one token takes one at a time
        torch.testing.assert_close(linear_kl(*given, chunk_bytes=budget), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, measure: str) -> None:
    p = problem(n_tokens=5, d_vocab=11, soft_cap=SOFT_CAP)
    unembedding = unembedding_of(kind, p, chunk_bytes=2 * module.N_BUFFERS * 11 * 8)
    assert torch.autograd.gradcheck(ours(measure, unembedding, p, weighted=True), p["hidden"].requires_grad_())


def test_the_logits_are_the_models() -> None:
    for soft_cap in (None, SOFT_CAP):
        p = problem(dtype=torch.float32, soft_cap=soft_cap)
        for kind in KINDS:
            torch.testing.assert_close(unembedding_of(kind, p).logits(p["hidden"]), naive_logits(p, p["hidden"]))


# Labels


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_a_label_take_no_part(kind: str) -> None:
    p = problem()
    known = p["labels"] != NO_LABEL
    assert 0 < known.sum() < N_TOKENS
    unembedding = unembedding_of(kind, p)
    value, gradient = value_and_gradient(ours("cross_entropy", unembedding, p), p["hidden"])
    of_known, _ = value_and_gradient(
        lambda hidden: unembedding.cross_entropy(hidden, p["labels"][known]), p["hidden"][known]
    )
    torch.testing.assert_close(value, of_known, rtol=1e-12, atol=0)
    assert not gradient[~known].any()
    assert gradient[known].any(1).all()
    # Whatever weight is given them.
    heavy = torch.where(known, p["weights"], 1e6)
    torch.testing.assert_close(
        unembedding.cross_entropy(p["hidden"], p["labels"], heavy),
        unembedding.cross_entropy(p["hidden"], p["labels"], p["weights"]),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_label_at_all_is_no_loss(kind: str) -> None:
    p = problem()
    p["labels"] = torch.full_like(p["labels"], NO_LABEL)
    value, gradient = value_and_gradient(ours("cross_entropy", unembedding_of(kind, p), p), p["hidden"])
    assert float(value) == 0
    assert not gradient.any()


# What is differentiated


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_hidden_states_get_a_gradient(kind: str) -> None:
    p = problem()
    given = [p[name].requires_grad_() for name in ("hidden", "clean", "weight", "bias", "weights")]
    unembedding = unembedding_of(kind, p)
    (unembedding.kl(p["hidden"], p["clean"], p["weights"])).backward()
    unembedding.cross_entropy(p["hidden"], p["labels"], p["weights"]).backward()
    assert [tensor.grad is not None for tensor in given] == [True, False, False, False, False]


@pytest.mark.parametrize("measure", MEASURES)
def test_no_gradient_is_formed_for_nobody(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    original = module._Write.backward
    monkeypatch.setattr(module._Write, "backward", lambda *args, **kw: (calls.append(None), original(*args, **kw)))
    p = problem()
    function = ours(measure, unembedding_of("linear", p), p)
    assert not function(p["hidden"]).requires_grad
    p["hidden"].requires_grad_()
    with torch.no_grad():
        value = function(p["hidden"])
    assert not value.requires_grad
    torch.testing.assert_close(value, naive(measure, p)(p["hidden"]).detach(), rtol=1e-12, atol=0)
    assert not calls
    function(p["hidden"])
    assert calls  # what is counted is what forms the gradient


@pytest.mark.parametrize(("measure", "with_grad"), [("kl", [False, True]), ("cross_entropy", [True])])
def test_a_module_is_given_a_graph_for_the_spliced_states_only(measure: str, with_grad: list[bool]) -> None:
    p = problem()
    differentiated: list[bool] = []

    def logits(hidden: Tensor) -> Tensor:
        differentiated.append(torch.is_grad_enabled() and hidden.requires_grad)
        return naive_logits(p, hidden)

    p["hidden"].requires_grad_()
    p["clean"].requires_grad_()
    function = ours(measure, ModuleUnembedding(logits, D_VOCAB), p)
    function(p["hidden"]).backward()
    assert sorted(differentiated) == with_grad
    differentiated.clear()
    with torch.no_grad():
        function(p["hidden"])
    assert differentiated == [False] * len(with_grad)


# Precision


@pytest.mark.parametrize(("kind", "measure", "soft_cap"), pairwise(KINDS, MEASURES, (None, SOFT_CAP)), ids=str)
def test_low_precision_weights_are_summed_in_float32(kind: str, measure: str, soft_cap: float | None) -> None:
    # Wide enough that 4,096 probabilities added up in bfloat16 would be off by far more than the logits' own rounding.
    p = problem(n_tokens=64, d_model=16, d_vocab=4096, dtype=torch.bfloat16, soft_cap=soft_cap)
    p["weight"] = p["weight"] / 4
    if kind == "module" and soft_cap is not None:
        # The model's own logits come in bfloat16, capped there: that much is its rounding, not ours.
        p["bias"] = None
    value, gradient = value_and_gradient(ours(measure, unembedding_of(kind, p), p), p["hidden"])
    exact = in_dtype(p, torch.float32)
    expected, expected_gradient = value_and_gradient(naive(measure, exact), exact["hidden"])
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected, rtol=2e-3 if kind == "linear" else 5e-3, atol=0)
    off = float((gradient.float() - expected_gradient).norm() / expected_gradient.norm())
    assert off < 1e-2 if kind == "linear" else off < 3e-2


@pytest.mark.parametrize("measure", MEASURES)
def test_autocast_does_not_lower_the_precision(measure: str) -> None:
    p = problem(n_tokens=64, d_model=16, d_vocab=512, dtype=torch.float32)
    exact = in_dtype(p, torch.float64)
    expected, expected_gradient = value_and_gradient(naive(measure, exact), exact["hidden"])
    with torch.autocast("cpu", torch.bfloat16):
        assert (p["hidden"] @ p["weight"]).dtype == torch.bfloat16  # autocast is in force
        value, gradient = value_and_gradient(ours(measure, unembedding_of("linear", p), p), p["hidden"])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert float((gradient.double() - expected_gradient).norm() / expected_gradient.norm()) < 1e-5


@pytest.mark.parametrize("measure", MEASURES)
def test_a_module_under_autocast_gives_figures_in_float32(measure: str) -> None:
    p = problem(n_tokens=64, d_model=16, d_vocab=512, dtype=torch.float32)
    expected, _ = value_and_gradient(naive(measure, p), p["hidden"])
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = value_and_gradient(ours(measure, unembedding_of("module", p), p), p["hidden"])
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=2e-2, atol=0)  # the logits themselves are rounded


@pytest.mark.parametrize(
    ("dtype", "soft_cap"), pairwise((torch.float64, torch.float32, torch.bfloat16), (None, SOFT_CAP)), ids=str
)
def test_equal_distributions_have_no_divergence_and_no_gradient(dtype: torch.dtype, soft_cap: float | None) -> None:
    p = problem(dtype=dtype, soft_cap=soft_cap)
    value, gradient = value_and_gradient(ours("kl", unembedding_of("linear", p), p), p["clean"])
    assert float(value) == 0
    assert not gradient.any()


@pytest.mark.parametrize(("kind", "measure"), pairwise(KINDS, MEASURES))
def test_logits_far_apart_stay_finite(kind: str, measure: str) -> None:
    p = problem(dtype=torch.float32)
    far = p | {"hidden": 200 * p["hidden"], "clean": 200 * p["clean"]}
    value, gradient = value_and_gradient(ours(measure, unembedding_of(kind, far), far), far["hidden"])
    exact = in_dtype(far, torch.float64)
    expected, _ = value_and_gradient(naive(measure, exact), exact["hidden"])
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("kind", "measure", "weighted"), pairwise(KINDS, MEASURES, (False, True)))
def test_no_tokens(kind: str, measure: str, weighted: bool) -> None:
    p = problem(n_tokens=0)
    value, gradient = value_and_gradient(ours(measure, unembedding_of(kind, p), p, weighted), p["hidden"])
    assert float(value) == 0
    assert gradient.shape == (0, D_MODEL)


# Finding it in a model

TOKENS = random_tokens(3, 12, 61)


class OtherUnembedding(nn.Module):
    """Logits that are no linear function of the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 61)).double()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden)


@pytest.mark.parametrize(
    ("kind", "soft_cap", "with_bias"),
    [
        ("HookedTransformer", None, True),
        ("TransformerBridge", None, False),
        ("gpt2", None, False),
        ("llama", None, False),
        ("phi", None, True),
        ("gemma2", LOGIT_CAP, False),
        ("mamba", None, False),
    ],
)
def test_a_linear_one_is_recognised_and_the_logits_left_out(kind: str, soft_cap: float | None, with_bias: bool) -> None:
    model = any_model(kind, torch.float64)
    expected = logits_of(model, TOKENS)
    spliced_model = SplicedModel(model)
    unembedding = spliced_model.unembedding
    assert isinstance(unembedding, LinearUnembedding)
    assert (unembedding.soft_cap, unembedding.bias is not None) == (soft_cap, with_bias)
    theirs = model.unembed if hasattr(model, "unembed") else model.model.get_output_embeddings()
    weight = theirs.W_U if hasattr(theirs, "W_U") else theirs.weight
    assert unembedding.weight.data_ptr() == weight.data_ptr()  # no copy of the widest weight there is
    calls: list[None] = []
    handle = theirs.register_forward_hook(lambda *_: calls.append(None))
    site = Site.of_sae(block_output(kind, 1))
    clean = spliced_model.clean(TOKENS, [site])
    spliced = spliced_model.spliced(clean, Where.everywhere(TOKENS), {site: lambda x: {site.read: x}})
    handle.remove()
    assert not calls
    assert clean.final is not None
    assert clean.final.shape == (3, 12, 16)
    assert spliced.final is not None
    assert torch.equal(clean.final, spliced.final)
    torch.testing.assert_close(unembedding.logits(clean.final).to(expected), expected)  # Mamba's come in float32


@pytest.mark.parametrize("kind", ["cohere", "granite"])
def test_logits_that_are_scaled_after_the_unembedding_are_taken_as_they_come(kind: str) -> None:
    model = any_model(kind, torch.float64)
    with pytest.warns(UserWarning, match="could not tell its unembedding, so all logits") as warned:
        spliced_model = SplicedModel(model)
    assert len([w for w in warned if "could not tell" in str(w.message)]) == 1
    clean = spliced_model.clean(TOKENS)
    assert clean.final is not None
    expected = logits_of(model, TOKENS)
    torch.testing.assert_close(clean.final, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(spliced_model.unembedding.logits(clean.final), expected, rtol=1e-9, atol=1e-9)
    flat, labels = clean.final.flatten(0, 1), Where.everywhere(TOKENS).labels(TOKENS)
    found = spliced_model.unembedding.cross_entropy(flat, labels)
    torch.testing.assert_close(found, nn.functional.cross_entropy(expected.flatten(0, 1), labels))


def test_a_soft_cap_of_transformer_lens_is_recognised() -> None:
    model = random_model(output_logits_soft_cap=LOGIT_CAP)
    spliced_model = SplicedModel(model)
    final = spliced_model.clean(TOKENS).final
    assert isinstance(spliced_model.unembedding, LinearUnembedding)
    assert spliced_model.unembedding.soft_cap == LOGIT_CAP
    assert final is not None
    torch.testing.assert_close(spliced_model.unembedding.logits(final), model(TOKENS))


def test_any_other_module_is_applied_in_chunks() -> None:
    model: Any = hugging_face_model("llama", torch.float64)
    model.model.set_output_embeddings(OtherUnembedding())
    spliced_model = SplicedModel(model)
    assert isinstance(spliced_model.unembedding, ModuleUnembedding)
    final = spliced_model.clean(TOKENS).final
    assert final is not None
    assert final.shape == (3, 12, 16)
    torch.testing.assert_close(spliced_model.unembedding.logits(final), logits_of(model, TOKENS), rtol=1e-9, atol=1e-9)


# What several passes are compared with


@pytest.mark.parametrize("soft_cap", [None, SOFT_CAP])
@pytest.mark.parametrize("kind", KINDS)
def test_a_remembered_distribution_is_worked_out_once_and_gives_the_same(
    kind: str, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(soft_cap=soft_cap)
    unembedding = unembedding_of(kind, p, chunk_bytes(5))
    remembered, seen = Remembered(p["clean"]), []
    write = module._Write.__call__

    def counted(self: Any, hidden: Tensor, out: Tensor) -> None:
        seen.append(hidden.data_ptr())
        write(self, hidden, out)

    monkeypatch.setattr(module._Write, "__call__", counted)
    for factor in (1.0, 0.5, 2.0):
        hidden = factor * p["hidden"]
        expected = value_and_gradient(lambda h: unembedding.kl(h, p["clean"], p["weights"]), hidden)
        found = value_and_gradient(lambda h: unembedding.kl(h, remembered, p["weights"]), hidden)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if kind == "linear":
        # Three chunks: for both sides of three plain ones, three remembered ones, and the clean side once.
        assert len(seen) == 3 * (3 * 2 + 3 + 1)


def test_what_is_too_much_is_not_remembered() -> None:
    assert Remembered.fits(512, 32_000)
    assert not Remembered.fits(16 * 1024, 50_257)


# Memory

MEASURE = """
import json, re, sys, types
from pathlib import Path
import torch

# The one module, as it needs torch only: importing SAELens takes longer than all the rest.
for name, folder in {"sae_lens_e2e": "", "sae_lens_e2e.splice": "splice"}.items():
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [str(Path(sys.argv[1]) / folder)]
from sae_lens_e2e.splice.unembedding import LinearUnembedding, ModuleUnembedding
assert "sae_lens" not in sys.modules

D_MODEL, D_VOCAB, N_TOKENS = 16, 50_257, 1024
torch.manual_seed(0)
weight = torch.randn(D_MODEL, D_VOCAB)
unembeddings = {
    "linear": LinearUnembedding(weight, torch.randn(D_VOCAB)),
    "module": ModuleUnembedding(lambda h: h @ weight, D_VOCAB),
}

def peak():
    # Not getrusage: its peak is inherited from the parent process, which is larger.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

def run(unembedding, n_tokens):
    hidden = torch.randn(n_tokens, D_MODEL, requires_grad=True)
    unembedding.kl(hidden, torch.randn(n_tokens, D_MODEL)).backward()
    unembedding.cross_entropy(hidden, torch.arange(n_tokens)).backward()

run(unembeddings["linear"], 2)  # what the first call loads is no part of it
start, growth = peak(), {}
for name, unembedding in unembeddings.items():
    before = peak()
    run(unembedding, N_TOKENS)
    growth[name] = peak() - before
torch.ones(N_TOKENS, D_VOCAB)
growth["and one logits tensor"] = peak() - start
print(json.dumps(growth))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc to ask for the peak resident size")
def test_peak_memory_is_a_few_chunks() -> None:
    run = run_fresh("-c", MEASURE, str(Path(sae_lens_e2e.__file__).parent))
    assert run.returncode == 0, run.stderr
    growth = json.loads(run.stdout)
    one_logits_tensor = 1024 * 50_257 * 4
    assert growth["and one logits tensor"] > 0.95 * one_logits_tensor  # the measurement sees what it should
    assert growth["linear"] < 100e6
    assert growth["module"] < 150e6


def test_the_kl_of_single_precision_is_that_of_double() -> None:
    """Where logits are large and distributions close, so that what is summed is small beside what it is the difference of."""
    generator = torch.Generator().manual_seed(0)
    clean = 6 * torch.randn(40, 3000, generator=generator)
    spliced = clean + 0.3 * torch.randn(40, 3000, generator=generator)
    # The logits themselves, so that no product rounds them.
    found = float(linear_kl(spliced, clean, torch.eye(3000)))
    log_p, log_q = clean.double().log_softmax(-1), spliced.double().log_softmax(-1)
    assert found == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=8e-7)
