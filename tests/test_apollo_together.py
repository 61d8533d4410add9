"""Apollo runs with SAEs at several positions: the config that repeats them, against their loss written out plainly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import TopKTrainingSAEConfig
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_lens_e2e import E2E, E2EDownstream, E2EMultiRunnerConfig, E2EMultiTrainingRunner, E2ERunnerConfig, Local
from sae_lens_e2e.apollo.model import PROCESSED
from sae_lens_e2e.splice import frozen
from tests.apollo import apollo_forward, named_model, run_config, write_tiny4l
from tests.models import dataset_of, random_model, random_tokens

EARLY, LATE = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
NAMES = {"blocks-0-hook_resid_post": EARLY, "blocks-1-hook_mlp_out": LATE}
LATER = ("blocks.2.hook_resid_pre", "blocks.2.hook_resid_post")
TOGETHER = {"saes.sae_positions": [EARLY, LATE], "loss.in_to_orig.hook_positions": list(LATER)}
QUIET: dict[str, Any] = {"d_in": 16, "output_path": None, "checkpoint_path": None}


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "final_config.yaml").write_text(yaml.dump(config))
    return folder


def from_apollo(folder: Path, changes: dict[str, Any] | None = None, **options: Any) -> E2EMultiRunnerConfig:
    config = run_config(TOGETHER | (changes or {}))
    return E2EMultiRunnerConfig.from_apollo(written(folder, config), **(QUIET | options))


class TestConfig:
    def test_an_sae_at_every_position_under_apollos_name(self, tmp_path: Path) -> None:
        cfg = from_apollo(tmp_path)
        assert cfg.hook_names_per_sae == NAMES
        assert list(cfg.saes) == list(NAMES)
        for sae in cfg.saes.values():
            assert sae.to_dict() | {"d_in": 16, "d_sae": 128, "sparsity_coefficient": 0.3} == sae.to_dict()
            assert sae.architecture() == "apollo"
        first, second = cfg.saes.values()
        assert first.metadata is not second.metadata
        assert cfg.objective == E2EDownstream(0.5, 2.5, LATER, 0.0)
        assert (cfg.max_grad_norm, cfg.lr, cfg.context_size, cfg.logger.run_name) == (10.0, 0.001, 64, "e2e_ds")
        assert (cfg.train_batch_size_tokens, cfg.training_tokens) == (16 * 64, 1600 * 64)
        assert E2EMultiRunnerConfig.from_dict(cfg.to_dict()).to_dict() == cfg.to_dict()

    def test_what_both_configs_say_of_one_position_is_the_same(self, tmp_path: Path) -> None:
        path = written(tmp_path, run_config())
        one = E2ERunnerConfig.from_apollo(path, **QUIET)
        several = E2EMultiRunnerConfig.from_apollo(path, **QUIET)
        assert several.hook_names_per_sae == {"blocks-2-hook_resid_pre": one.hook_name}
        assert several.saes["blocks-2-hook_resid_pre"].to_dict() == one.sae.to_dict()
        shared = one.to_dict().keys() & several.to_dict().keys()
        assert {name: one.to_dict()[name] for name in shared} == {name: several.to_dict()[name] for name in shared}

    def test_the_other_architecture_and_a_named_model(self, tmp_path: Path) -> None:
        config = named_model("gpt2-small", changes=TOGETHER)
        cfg = E2EMultiRunnerConfig.from_apollo(written(tmp_path, config), architecture="standard", **QUIET)
        assert {sae.architecture() for sae in cfg.saes.values()} == {"standard"}
        assert cfg.model_from_pretrained_kwargs == PROCESSED

    def test_the_width_is_found_beside_the_run(self, tmp_path: Path) -> None:
        write_tiny4l(tmp_path / "tiny4l")
        (tmp_path / "run").mkdir()
        assert {sae.d_in for sae in from_apollo(tmp_path / "run", d_in=None).saes.values()} == {32}

    @pytest.mark.parametrize(
        ("changes", "objective"),
        [
            ({"loss.in_to_orig": None, "loss.logits_kl": None, "loss.out_to_in.coeff": 2.0}, Local(2 / 16)),
            ({"loss.in_to_orig": None}, E2E(0.5)),
            # Where a term is there the SAEs are spliced in, whatever it weighs.
            ({"loss.in_to_orig": None, "loss.logits_kl.coeff": 0.0, "loss.out_to_in.coeff": 2.0}, E2E(0.0, 2 / 16)),
            (
                {"loss.in_to_orig.total_coeff": 0, "loss.logits_kl": None, "loss.out_to_in.coeff": 2.0},
                E2E(0.0, 2 / 16),
            ),
        ],
    )
    def test_the_loss(self, tmp_path: Path, changes: dict[str, Any], objective: Any) -> None:
        assert from_apollo(tmp_path, changes).objective == objective

    def test_fields_of_ones_own(self, tmp_path: Path) -> None:
        cfg = from_apollo(tmp_path, {"loss.in_to_orig": None}, hook_names={"a": EARLY, "b": LATE}, lr=0.5)
        assert (list(cfg.saes), cfg.lr) == (["a", "b"], 0.5)
        saes = {name: TopKTrainingSAEConfig(d_in=24, d_sae=48, k=2) for name in NAMES}
        cfg = from_apollo(tmp_path, {"loss.out_to_in.coeff": 1.0}, saes=saes, d_in=None)
        assert (cfg.saes, cfg.objective) == (saes, E2EDownstream(0.5, 2.5, LATER, 1 / 24))

    @pytest.mark.parametrize(
        ("changes", "options", "parts"),
        [
            ({"saes.sae_positions": []}, {}, ["saes.sae_positions=[]", "hook_names="]),
            ({"saes.sae_positions": ["hook_resid_pre"]}, {}, ["saes.sae_positions: 'hook_resid_pre'"]),
            ({"saes.sae_positions": [EARLY, "blocks.1.attn.hook_z"]}, {}, ["at blocks.1.attn.hook_z", "hook_names="]),
            (
                {"loss.in_to_orig.hook_positions": [EARLY.replace("0", "1"), LATER[0], LATE]},
                {},
                [f"loss.in_to_orig.hook_positions: {LATE} does not come after", EARLY],
            ),
            (
                {"loss.in_to_orig.hook_positions": ["blocks.0.hook_mlp_out", LATER[0]]},
                {},
                ["loss.in_to_orig.hook_positions: blocks.0.hook_mlp_out does not"],
            ),
            ({"loss.out_to_orig": {"coeff": 1.0}}, {}, ["loss.out_to_orig"]),
            (
                {"loss.out_to_in.coeff": 1.0},
                {"saes": {n: TopKTrainingSAEConfig(16 * (i + 1), 64, k=2) for i, n in enumerate(NAMES)}},
                ["loss.out_to_in.coeff=1.0", "16, 32", "objective="],
            ),
            ({"anything_new": 1}, {}, ["anything_new=1 has no equivalent"]),
        ],
    )
    def test_what_has_no_equivalent(
        self, tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], parts: list[str]
    ) -> None:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            from_apollo(tmp_path, changes, **options)
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value)

    def test_the_config_of_one_sae_points_here(self, tmp_path: Path) -> None:
        path = written(tmp_path, run_config(TOGETHER))
        with pytest.raises(ValueError, match=r"E2EMultiRunnerConfig\.from_apollo") as caught:
            E2ERunnerConfig.from_apollo(path, **QUIET)
        assert EARLY in str(caught.value)
        assert LATE in str(caught.value)
        assert E2ERunnerConfig.from_apollo(path, hook_name=LATE, **QUIET).hook_name == LATE


def naive_loss(
    model: HookedTransformer, loss: dict[str, Any], saes: dict[str, dict[str, Tensor]], tokens: Tensor
) -> Tensor:
    """Apollo's loss: each term of each position added up; two whole passes, all logits, nothing detached but the clean pass."""
    later = loss["in_to_orig"] or {"hook_positions": [], "total_coeff": 0.0}
    spliced_in = loss["logits_kl"] is not None or loss["in_to_orig"] is not None
    clean: dict[str, Tensor] = {}
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    compared: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        clean[hook.name] = activation

    def splice(activation: Tensor, hook: Any) -> Tensor:
        features, output = apollo_forward(saes[hook.name], activation)
        seen[hook.name] = (activation, features, output)
        return output

    def compare(activation: Tensor, hook: Any) -> None:
        compared[hook.name] = activation

    with torch.no_grad():
        hooks = [(hook, keep) for hook in (*saes, *later["hook_positions"])]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)
    if spliced_in:
        hooks = [*((hook, splice) for hook in saes), *((hook, compare) for hook in later["hook_positions"])]
        new_logits = model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)
    else:
        new_logits = logits
        for hook in saes:
            features, output = apollo_forward(saes[hook], clean[hook])
            seen[hook] = (clean[hook], features, output)
    total = torch.zeros((), dtype=logits.dtype)
    if loss["logits_kl"] is not None:
        total = total + loss["logits_kl"]["coeff"] * (logits.exp() * (logits - new_logits)).sum(-1).mean()
    for given, features, output in seen.values():
        sparsity = features.norm(p=loss["sparsity"]["p_norm"], dim=-1).mean() / given.shape[-1]
        total = total + loss["sparsity"]["coeff"] * sparsity
        total = total + loss["out_to_in"]["coeff"] * (given - output).square().mean()
    for hook in later["hook_positions"]:
        share = later["total_coeff"] / len(later["hook_positions"])
        total = total + share * (compared[hook] - clean[hook]).square().mean()
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss.out_to_in.coeff": 0.7, "loss.sparsity": {"coeff": 2.0, "p_norm": 1.0}},
        {"loss.in_to_orig": None, "loss.sparsity.p_norm": 2.0},
        {"loss.in_to_orig": None, "loss.logits_kl.coeff": 0.0, "loss.out_to_in.coeff": 1.5},
        {"loss.in_to_orig": None, "loss.logits_kl": None, "loss.out_to_in.coeff": 1.5},
    ],
    ids=["e2e_ds", "e2e_ds-out_to_in", "e2e", "spliced-local", "local"],
)
def test_losses_and_gradients_of_a_group_are_apollos(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = TOGETHER | {"batch_size": 2, "effective_batch_size": 4, "train_data.n_ctx": 12} | changes
    cfg = from_apollo(tmp_path, settings)
    for sae in cfg.saes.values():
        sae.dtype = "float64"
    model, tokens = random_model(dtype=torch.float64), random_tokens(4, 12, 61)
    runner = E2EMultiTrainingRunner(cfg, override_model=model, override_dataset=dataset_of(tokens))
    # The decoder's columns are not of length 1, as they are not in training.
    with torch.no_grad():
        for sae in runner.saes.values():
            sae.W_dec.mul_(torch.linspace(0.5, 2, len(sae.W_dec))[:, None])
    theirs = {NAMES[name]: as_apollos(dict(sae.named_parameters())) for name, sae in runner.saes.items()}
    for parameters in theirs.values():
        for parameter in parameters.values():
            parameter.requires_grad_()

    group = runner.make_group()
    with frozen(model):
        where = group.plan.positions.of(tokens)
        group.begin_step()
        for part, micro in zip(tokens.split(2), where.split(2), strict=True):
            clean = model_clean(runner, part)
            group.forward_backward(clean, micro, micro.n / where.n, 1.0)
        expected = naive_loss(model, run_config(settings)["loss"], theirs, tokens)
        expected.backward()

    for name, hook in NAMES.items():
        torch.testing.assert_close(group.outputs[name].loss, expected.detach(), rtol=1e-6, atol=0)
        ours = as_apollos({parameter: p.grad for parameter, p in runner.saes[name].named_parameters()})
        for parameter, found in ours.items():
            gradient = theirs[hook][parameter].grad
            assert gradient is not None
            assert gradient.norm() > 0
            assert float((found - gradient).norm() / gradient.norm()) < 1e-5, (name, parameter)


def as_apollos(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """An SAE's parameters, or their gradients, under Apollo's names; copies of them."""
    named = {
        "encoder.weight": tensors["W_enc"].T,
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T,
        "decoder.bias": tensors["b_dec"],
    }
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def model_clean(runner: E2EMultiTrainingRunner, tokens: Tensor) -> Any:
    """The clean pass that a step makes."""
    objective = runner.objective
    return runner.splice.clean(tokens, runner.cfg.sites.values(), objective.hooks, objective.compares_logits)
