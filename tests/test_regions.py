"""Blocks that run in one piece: checkpointed to the last bit of the gradient, and compiled once for all that are equal."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sae_lens_e2e.cli.train import parse_train
from sae_lens_e2e.finetuning.settings import run_fields
from sae_lens_e2e.splice import Compilation, Site, SplicedModel, Where
from sae_lens_e2e.sweep import read_sweep, run_sweep
from sae_lens_e2e.sweep import run as sweep_run
from sae_lens_e2e.sweep.run import groups
from sae_lens_e2e.training import setup
from sae_lens_e2e.training.same_run import MAY_CHANGE, MAY_DIFFER
from tests.models import ANY, any_model, block_output, blocks_of, inside_block, logits_of, random_model, random_tokens
from tests.processes import run_code
from tests.test_sweep import BASE, sweep_file
from tests.training import EVERY_STEP, make_multi_runner, make_runner, multi_config, runner_config

TOKENS = random_tokens(3, 12, 61)
EVERYWHERE = Where.everywhere(TOKENS)


class Changed:
    """What a module might put in: something of what it read, from a weight of its own. Counts its calls."""

    def __init__(self, site: Site):
        self.site, self.calls = site, 0
        self.weight = torch.full((16,), 0.5, requires_grad=True)

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {self.site.writes[0]: x * self.weight + 0.1}


class Pass:
    """A clean and a spliced pass, their values and gradient, and the bytes that were kept for the backward pass."""

    def __init__(self, model: SplicedModel, site: Site, hooks: Sequence[str] = (), checkpoint: bool = False):
        module, kept = Changed(site), list[int]()

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel() * tensor.element_size())
            return tensor

        clean = model.clean(TOKENS, [site], hooks)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            spliced = model.spliced(clean, EVERYWHERE, {site: module}, hooks, checkpoint=checkpoint)
            assert spliced.final is not None
            assert clean.final is not None
            loss = model.unembedding.kl(spliced.final.flatten(0, 1), clean.final.flatten(0, 1))
            loss = loss + sum((spliced.at[hook] ** 2).mean() for hook in hooks)
        loss.backward()
        assert module.weight.grad is not None
        self.values = [loss.detach(), module.weight.grad, clean.final, spliced.final.detach(), *clean.at.values()]
        self.values += [activation.detach() for activation in spliced.at.values()]
        self.bytes, self.calls = sum(kept), module.calls


def calls_inside(model: Any, block: int) -> list[None]:
    """A list that grows whenever something inside a block is called."""
    called: list[None] = []
    next(blocks_of(model)[block].children()).register_forward_pre_hook(lambda *_: called.append(None))
    return called


def left_alone(model: Any) -> bool:
    return not any("forward" in vars(block) for block in blocks_of(model))


# Checkpointed


@pytest.mark.parametrize("kind", ANY)
def test_checkpointing_keeps_less_and_gives_the_same_gradient_to_the_last_bit(kind: str) -> None:
    model = any_model(kind)
    # What the block before last returns is seen outside of it.
    spliced_model, site, hooks = SplicedModel(model), Site.of_sae(block_output(kind, 0)), [block_output(kind, 1)]
    with spliced_model.running():
        plain = Pass(spliced_model, site, hooks)
        checkpointed = Pass(spliced_model, site, hooks, checkpoint=True)
    assert checkpointed.bytes < 0.6 * plain.bytes
    assert checkpointed.calls == plain.calls == 1
    for value, expected in zip(checkpointed.values, plain.values, strict=True):
        assert torch.equal(value, expected)
    assert left_alone(model)


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge", "llama"])
def test_only_blocks_that_nobody_looks_into_run_again(kind: str) -> None:
    model = random_model(n_layers=4) if kind == "HookedTransformer" else any_model(kind)
    spliced_model, site = SplicedModel(model), Site.of_sae(inside_block(kind, 0)[0])
    inside_the_next = inside_block(kind, 1)[1]
    assert spliced_model.blocks_without([*site.writes, inside_the_next]) == list(range(2, len(blocks_of(model))))
    called = [calls_inside(model, block) for block in range(3)]
    with spliced_model.running():
        clean = spliced_model.clean(TOKENS, [site])
        before = [len(calls) for calls in called]
        module, seen = Changed(site), list[Tensor]()
        spliced = spliced_model.spliced(clean, EVERYWHERE, {site: module}, [inside_the_next], checkpoint=True)
        assert spliced.final is not None
        spliced.final.register_hook(seen.append)
        spliced.final.sum().backward()
    runs = [len(calls) - earlier for calls, earlier in zip(called, before, strict=True)]
    # Some call the same thing twice in a block.
    assert [count // earlier for count, earlier in zip(runs, before, strict=True)] == [1, 1, 2]
    assert module.calls == 1
    assert inside_the_next in spliced.at
    assert seen


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge"])
def test_what_enters_a_block_is_seen_outside_of_it(kind: str) -> None:
    """So that the default of `e2e_ds`, which compares what enters each later block, leaves them in one piece."""
    model = SplicedModel(any_model(kind))
    assert model.blocks_without(["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]) == [0, 1, 2]
    assert model.blocks_without(["blocks.0.hook_resid_pre", "blocks.2.hook_resid_mid"]) == [1]


def test_somebody_elses_hook_at_a_blocks_input_is_not_passed_over() -> None:
    model = random_model()
    model.blocks[1].hook_resid_pre.add_perma_hook(lambda tensor, hook: tensor + 1)  # noqa: ARG005
    clean = SplicedModel(model).clean(TOKENS, hooks=["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"])
    assert torch.equal(clean.at["blocks.1.hook_resid_pre"], clean.at["blocks.0.hook_resid_post"] + 1)


# Compiled


def counting(backend: str = "eager") -> CompileCounterWithBackend:
    """A compiler that needs no C++, and counts what it is asked to compile."""
    torch.compiler.reset()
    return CompileCounterWithBackend(backend)


ROOT = Path(__file__).parent.parent
COMPILED = ("HookedTransformer", "llama", "gemma2")


def test_equal_blocks_are_compiled_once_with_gradient_and_once_without() -> None:
    """In a process that has compiled nothing: what dynamo has seen before, it may compile in other pieces."""
    calls = "; ".join(f"compile_once({kind!r})" for kind in COMPILED)
    done = run_code(f"from tests.test_regions import compile_once; {calls}", ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def compile_once(kind: str) -> None:
    # One that makes a graph of the backward pass, too.
    model, counter = any_model(kind), counting("aot_eager")
    spliced_model, site, hooks = SplicedModel(model), Site.of_sae(block_output(kind, 0)), [block_output(kind, 1)]
    with spliced_model.running():
        plain = Pass(spliced_model, site, hooks)
    first_alone: list[int] = []

    def note(*_: Any) -> None:
        first_alone.append(counter.frame_count)

    handle = blocks_of(model)[1].register_forward_pre_hook(note)
    with spliced_model.running(Compilation(backend=counter)):
        compiled = Pass(spliced_model, site, hooks)
        n_compiled = counter.frame_count
        # One block without gradient; then one with it, before the other. Gemma 2's take turns: in some versions one gets a mask, one none.
        n_kinds = 2 if kind == "gemma2" else 1
        assert first_alone[0] > 0
        assert n_compiled <= 2 * n_kinds * first_alone[0]
        again = Pass(spliced_model, site, hooks, checkpoint=True)
    handle.remove()
    assert counter.frame_count == n_compiled
    for ours in (compiled, again):
        for value, expected in zip(ours.values, plain.values, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert again.bytes < compiled.bytes
    assert left_alone(model)


class Calls:
    """A compiler that runs what it is given as it is, and counts how often."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.number = 0

    def __call__(self, graph: Any, _inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.number += 1
            return graph.forward(*args)

        return run

    def taken(self) -> int:
        """The calls since this was last asked."""
        number, self.number = self.number, 0
        return number


def test_blocks_run_compiled_but_those_that_stand_in_or_are_looked_into() -> None:
    model, calls = random_model(n_layers=4), Calls()
    spliced_model, site = SplicedModel(model), Site.of_sae("blocks.1.hook_resid_pre")
    inside = "blocks.2.attn.hook_z"
    with spliced_model.running():
        plain = Pass(spliced_model, site, [inside])
    calls.taken()
    with spliced_model.running(Compilation(backend=calls)):
        clean = spliced_model.clean(TOKENS, [site])
        # In several pieces each by older PyTorch.
        pieces, rest = divmod(calls.taken(), 4)
        assert rest == 0
        assert pieces == 1 or (pieces > 1 and Version(torch.__version__) < Version("2.8"))
        spliced_model.spliced(clean, EVERYWHERE, {site: Changed(site)})
        assert calls.taken() == 3 * pieces
        # Compiled by now, and looked into all the same.
        looking = Pass(spliced_model, site, [inside])
        assert calls.taken() == (3 + 2) * pieces
        logits_of(model, TOKENS)
        assert calls.taken() == 0, "others' calls of the model are not ours to compile"
    for value, expected in zip(looking.values, plain.values, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    spliced_model.clean(TOKENS)
    assert calls.taken() == 0


def test_a_compiler_that_is_missing_is_said_in_one_line() -> None:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    spliced_model = SplicedModel(any_model("llama"))
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        spliced_model.running(Compilation()),
        pytest.raises(RuntimeError, match=r"^compile_llm=True: .*LlamaDecoderLayer here: .*C\+\+.*to False$") as error,
    ):
        spliced_model.clean(TOKENS)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


# In a run


HOOKS = {"HookedTransformer": "blocks.1.hook_resid_pre", "llama": "model.layers.0"}


def settings_for(kind: str) -> dict[str, Any]:
    class_name = "HookedTransformer" if kind == "HookedTransformer" else "AutoModelForCausalLM"
    return {"hook_name": HOOKS[kind], "model_class_name": class_name, "logger": EVERY_STEP, "lr": 1e-2}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_run_with_them_is_the_run_without(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compilations, runs = list[Compilation](), list[int]()
    counter = counting()

    def compilation(cfg: Any, real: Any = setup.compilation) -> Compilation | None:
        found = real(cfg)
        if found is not None:
            compilations.append(found)
        return found and found._replace(backend=counter)

    monkeypatch.setattr(setup, "compilation", compilation)

    def trained(**options: Any) -> tuple[dict[str, Tensor], Any]:
        model = any_model(kind)
        called = calls_inside(model, 2)
        cfg = runner_config(**settings_for(kind), **options, output_path=str(tmp_path / json.dumps(options)))
        runner = make_runner(cfg, model)
        called.clear()
        sae = runner.run()
        assert runner.cfg is cfg
        if not cfg.compile_llm:
            runs.append(len(called))
        assert "run_with_cache" not in vars(model), "SAELens' own compilation outlives a run"
        assert left_alone(model)
        return dict(sae.state_dict()), cfg

    plain, _ = trained()
    checkpointed, cfg = trained(checkpoint_activations=True)
    assert all(torch.equal(checkpointed[name], value) for name, value in plain.items())
    assert type(cfg).from_dict(json.loads(json.dumps(cfg.to_dict()))).checkpoint_activations is True
    assert not counter.frame_count
    # Clean and spliced, and again for the backward pass.
    assert runs[1] * 2 == runs[0] * 3
    for options in ({}, {"checkpoint_activations": True}):
        compiled, _ = trained(compile_llm=True, llm_compilation_mode="default", **options)
        for name, value in plain.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)
    assert counter.frame_count
    assert [one.mode for one in compilations] == ["default", "default"]


def test_several_saes_are_trained_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = counting()
    monkeypatch.setattr(setup, "compilation", lambda cfg: Compilation(backend=counter) if cfg.compile_llm else None)
    saes = {
        name: (Site.of_sae(hook), runner_config().sae)
        for name, hook in (("a", "blocks.0.hook_resid_mid"), ("b", "blocks.2.hook_resid_pre"))
    }

    def trained(**options: Any) -> dict[str, Tensor]:
        runner = make_multi_runner(multi_config(saes, objective="e2e", logger=EVERY_STEP, **options))
        return {name: sae.W_dec.detach() for name, sae in runner.run().items()}

    plain, checkpointed = trained(), trained(checkpoint_activations=True)
    compiled = trained(compile_llm=True, checkpoint_activations=True)
    assert counter.frame_count
    for name, value in plain.items():
        assert torch.equal(checkpointed[name], value)
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"compile_llm": True, "hook_name": "blocks.0.hook_resid_mid", "objective": "local"},
            "compile_llm=True: every block that is run has a hook inside",
        ),
        (
            {
                "compile_llm": True,
                "hook_name": "blocks.0.hook_resid_mid",
                "objective": {
                    "name": "e2e_ds",
                    "downstream_hooks": ["blocks.1.hook_resid_mid", "blocks.2.attn.hook_z"],
                },
            },
            "compile_llm=True: every block that is run has a hook inside",
        ),
        (
            {"checkpoint_activations": True, "hook_name": "blocks.2.hook_mlp_out", "objective": "e2e"},
            "checkpoint_activations=True: every block that is run after the first SAE has a hook inside",
        ),
    ],
)
def test_where_no_block_is_left_in_one_piece_it_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_runner(runner_config(**overrides))
    assert "\n" not in str(error.value)
    assert "set it to False" in str(error.value)


def test_blocks_before_an_sae_are_enough_to_compile() -> None:
    make_runner(runner_config(compile_llm=True, hook_name="blocks.2.hook_mlp_out", objective="local"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"compile_llm": True, "llm_compilation_mode": "reduce-overhead"},
            "llm_compilation_mode='reduce-overhead' must be one of None, default, max-autotune-no-cudagraphs",
        ),
        (
            {"compile_llm": True, "model_class_name": "TransformerBridge"},
            "compile_llm=True: torch.compile cannot trace the blocks of a TransformerBridge; set it to False",
        ),
        (
            {"checkpoint_activations": True, "objective": "local"},
            "checkpoint_activations=True: objective 'local' runs nothing after the SAE; set it to False",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_a_model_is_there(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        runner_config(**overrides)
    assert "\n" not in str(error.value)


def test_stages_may_be_checkpointed_if_one_runs_past_the_sae() -> None:
    cfg = runner_config(objective="warm_e2e", checkpoint_activations=True, training_tokens=10 * 48)
    make_runner(cfg).run()


def test_they_are_flags_and_settings_of_every_kind_of_run() -> None:
    flags = ["--checkpoint_activations", "true", "--compile_llm", "true", "--llm_compilation_mode", "default"]
    cfg, *_ = parse_train(flags)
    assert (cfg.checkpoint_activations, cfg.compile_llm, cfg.llm_compilation_mode) == (True, True, "default")
    assert {"checkpoint_activations", "compile_llm", "llm_compilation_mode"} <= run_fields()
    # They change no result but by rounding, and only compiling does that.
    assert "checkpoint_activations" in MAY_DIFFER
    assert {"compile_llm", "llm_compilation_mode"} <= set(MAY_CHANGE) - set(MAY_DIFFER)
    points = {
        "plain": {},
        "same": {},
        "compiled": {"compile_llm": True},
        "checkpointed": {"checkpoint_activations": True},
    }
    found = groups({name: runner_config(**options) for name, options in points.items()})
    assert found == [["plain", "same"], ["compiled"], ["checkpointed"]]


def test_points_of_a_sweep_are_compiled_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counter, asked = counting(), list[bool]()

    def compilation(cfg: Any) -> Compilation | None:
        asked.append(cfg.compile_llm)
        return Compilation(backend=counter) if cfg.compile_llm else None

    monkeypatch.setattr(sweep_run, "compilation", compilation)
    options = {"compile_llm": True, "checkpoint_activations": True}
    path = sweep_file(tmp_path, {"sae.l1_coefficient": [0.1, 0.3]}, BASE | options | {"training_tokens": 64 * 2})
    assert len(run_sweep(read_sweep(path), tmp_path / "out")) == 2
    assert asked == [True]
    assert counter.frame_count
