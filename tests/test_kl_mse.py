"""KL and reconstruction in balance, against Karvonen's equation written out by hand: α, its running mean, one SAE and several."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sae_lens import StandardTrainingSAEConfig
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_e2e import E2E, E2EMultiRunnerConfig, KLAndMSE, Objective
from sae_lens_e2e.objectives.plugins import make_objective
from sae_lens_e2e.objectives.terms import balance, relative_mse
from sae_lens_e2e.splice import Site, frozen
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.objective_state import FILENAME
from sae_lens_e2e.training.trainer import NonFiniteLossError
from tests.models import random_model, random_tokens, run_with_hooks
from tests.saes import randomised
from tests.training import (
    EVERY_STEP,
    group_gradients,
    make_multi_runner,
    make_runner,
    make_trainer,
    multi_config,
    runner_config,
)

L1 = 0.02
EARLY, LATE = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
TOKENS = random_tokens(4, 12, 61)


def group_of(hooks: list[str], objective: Objective, n_micro: int = 1, **overrides: Any) -> Group:
    """SAEs at some hooks, by the hooks' names where there are several; no weight at zero or one."""
    settings: dict[str, Any] = {
        "objective": objective,
        "store_batch_size_prompts": 4 // n_micro,
        "logger": EVERY_STEP,
        "dtype": "float32",
    }
    sae = StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=L1)
    if len(hooks) == 1:
        runner = make_runner(runner_config(sae=sae, hook_name=hooks[0], **(settings | overrides)))
        saes = [runner.sae]
    else:
        sites = {hook.split(".")[1]: (Site.of_sae(hook), copy.deepcopy(sae)) for hook in hooks}
        runner = make_multi_runner(multi_config(sites, **(settings | overrides)))
        saes = list(runner.saes.values())
    for seed, one in enumerate(saes):
        randomised(one, seed)
    return runner.make_group()


def naive(group: Group, tokens: Tensor) -> dict[str, Any]:
    """KL, each SAE's MSE as SAELens and relative to its variance, and the L1 losses of whole passes with plain hooks."""
    l1: list[Tensor] = []
    mse: dict[str, Tensor] = {}
    relative: dict[str, Tensor] = {}

    def splice_in(name: str) -> Any:
        sae: Any = group.trainers[name].sae

        def hook(x: Tensor) -> Tensor:
            features = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
            x_hat = features @ sae.W_dec + sae.b_dec
            l1.append(L1 * (features * sae.W_dec.norm(dim=1)).sum(-1).mean())
            mse[name] = ((x_hat - x) ** 2).sum(-1).mean()
            variance = ((x - x.mean((0, 1))) ** 2).sum(-1).mean()
            relative[name] = mse[name] / variance.detach()
            return x_hat

        return hook

    replace = {site.read: splice_in(name) for name, site in group.sites.items()}
    clean, _ = run_with_hooks(group.model.model, tokens, {})
    logits, _ = run_with_hooks(group.model.model, tokens, replace)
    p, q = clean.softmax(-1), logits.softmax(-1)
    return {"kl": (p * (p / q).log()).sum(-1).mean(), "mse": mse, "relative": relative, "l1": torch.stack(l1).sum()}


def naive_loss(group: Group, tokens: Tensor, n_micro: int) -> tuple[Tensor, list[float]]:
    """½ (α KL + MSE) + L1 and α, by micro-batches of as many tokens."""
    losses, alphas = [], []
    for part in tokens.chunk(n_micro):
        found = naive(group, part)
        mse = (
            next(iter(found["mse"].values()))
            if len(group.sites) == 1
            else torch.stack([*found["relative"].values()]).sum()
        )
        alpha = float(mse.detach()) / (float(found["kl"].detach()) + 1e-8)
        losses.append(0.5 * (alpha * found["kl"] + mse) + found["l1"])
        alphas.append(alpha)
    return torch.stack(losses).mean(), alphas


def naive_gradients(group: Group, loss: Tensor) -> dict[str, dict[str, Tensor]]:
    by_name = {name: dict(trainer.sae.named_parameters()) for name, trainer in group.trainers.items()}
    return {
        name: dict(zip(own, torch.autograd.grad(loss, list(own.values()), retain_graph=True), strict=True))
        for name, own in by_name.items()
    }


def assert_gradients(found: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Mapping[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for sae, of_sae in expected.items():
        for name, gradient in of_sae.items():
            scale = float(gradient.abs().max())
            assert scale > 0
            assert float((found[sae][name] - gradient).abs().max()) < 2e-5 * scale, f"{sae}.{name}"


# The equation


@pytest.mark.parametrize("n_micro", [1, 2])
@pytest.mark.parametrize("hooks", [[EARLY], [EARLY, LATE]], ids=["one", "two"])
def test_loss_and_gradient_are_the_equations(hooks: list[str], n_micro: int) -> None:
    group = group_of(hooks, KLAndMSE(), n_micro)
    with frozen(group.model.model):
        loss, alphas = naive_loss(group, TOKENS, n_micro)
        expected = naive_gradients(group, loss)
        plain = naive(group, TOKENS)
    with group.model.running():
        found = group_gradients(group, TOKENS)
        outputs = group.outputs
    assert_gradients(found, expected)
    for name, output in outputs.items():
        assert float(output.loss) == pytest.approx(float(loss), rel=1e-5)
        assert float(output.losses["kl"]) == pytest.approx(float(plain["kl"]), rel=1e-5)
        assert float(output.losses["mse_loss"]) == pytest.approx(float(plain["mse"][name]), rel=1e-5)
        # What is logged of a step is the mean over its tokens.
        assert float(output.parts["balanced_kl/alpha"]) == pytest.approx(sum(alphas) / n_micro, rel=1e-5)
    if len(hooks) == 2 and n_micro == 1:
        parts = next(iter(outputs.values())).parts
        for name, relative in plain["relative"].items():
            assert float(parts[f"relative_mse/{name}"]) == pytest.approx(float(relative), rel=1e-5)


def test_kl_and_mse_weigh_the_same() -> None:
    group = group_of([EARLY], KLAndMSE())
    with group.model.running():
        group_gradients(group, TOKENS)
    losses = {name: float(value) for name, value in group.outputs["sae"].losses.items()}
    assert losses["balanced_kl"] == pytest.approx(losses["mse_loss"], rel=1e-6)
    assert losses["kl"] != pytest.approx(losses["mse_loss"], rel=0.1)


def test_alpha_by_hand() -> None:
    kl = torch.tensor(0.25, requires_grad=True)
    mse = torch.tensor(3.0, requires_grad=True)
    alpha = balance(mse, kl)
    assert float(alpha) == pytest.approx(12.0)
    assert not alpha.requires_grad
    assert float(balance(mse, torch.tensor(0.0))) == pytest.approx(3e8)


def test_relative_mse_by_hand() -> None:
    target = torch.tensor([[1.0, 10.0], [3.0, 10.0]], requires_grad=True)
    output = torch.tensor([[1.0, 9.0], [4.0, 10.0]], requires_grad=True)
    # Errors 1 and 1; the mean is (2, 10), from which each token is 1 away.
    loss = relative_mse({"a": output}, {"a": target})
    assert float(loss) == pytest.approx(2 / 2)
    loss.backward()
    assert output.grad is not None
    # 2 · (output - target) / 2, the variance held.
    torch.testing.assert_close(output.grad, torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    torch.testing.assert_close(target.grad, -output.grad)
    # Several hooks that one SAE writes are one sum over another.
    twice = relative_mse({"a": output, "b": 5 * output}, {"a": target, "b": 5 * target})
    assert float(twice) == pytest.approx((2 + 50) / (2 + 50))


def test_low_precision_is_accumulated_in_float32() -> None:
    target = torch.randn(400, 50, generator=torch.Generator().manual_seed(0))
    found = relative_mse({"a": (2 * target).bfloat16()}, {"a": target.bfloat16()})
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(1.0, rel=1e-2)


def test_a_fixed_alpha_is_a_fixed_weight() -> None:
    fixed = group_of([EARLY], KLAndMSE(alpha=3.0))
    plain = group_of([EARLY], E2E(kl_coefficient=1.5, mse_coefficient=0.5))
    with fixed.model.running(), plain.model.running():
        assert_gradients(group_gradients(fixed, TOKENS), group_gradients(plain, TOKENS))
    assert float(fixed.outputs["sae"].parts["balanced_kl/alpha"]) == 3.0


@pytest.mark.parametrize("without", ["kl_coefficient", "mse_coefficient"])
@pytest.mark.parametrize("hooks", [[EARLY], [EARLY, LATE]], ids=["one", "two"])
def test_one_of_the_two_may_have_no_weight(hooks: list[str], without: str) -> None:
    weights: dict[str, Any] = {without: 0.0}
    group = group_of(hooks, KLAndMSE(**weights))
    with group.model.running():
        found = group_gradients(group, TOKENS)
    assert all(gradient.any() for of_sae in found.values() for gradient in of_sae.values())
    assert float(next(iter(group.outputs.values())).losses["kl"]) > 0


# The running mean


def test_the_running_mean_is_over_forward_passes() -> None:
    decay, n_micro = 0.75, 2
    group = group_of([EARLY], KLAndMSE(alpha_decay=decay), n_micro)
    mean: float | None = None
    with group.model.running():
        for seed in range(3):
            tokens = random_tokens(4, 12, 61, seed)
            used = []
            for part in tokens.chunk(n_micro):
                found = naive(group, part)
                now = float(found["mse"]["sae"]) / (float(found["kl"]) + 1e-8)
                mean = now if mean is None else decay * mean + (1 - decay) * now
                used.append(mean)
            group.step(tokens)
            alpha = float(group.outputs["sae"].parts["balanced_kl/alpha"])
            assert alpha == pytest.approx(sum(used) / n_micro, rel=1e-4), seed
    (held,) = group.course.means.values.values()
    assert not held.requires_grad
    assert float(held) == pytest.approx(mean, rel=1e-4)


def test_a_step_that_does_not_stand_leaves_the_mean_as_it_was() -> None:
    group = group_of([EARLY], KLAndMSE(alpha_decay=0.9))
    with group.model.running():
        group.step(TOKENS)
        before = dict(group.course.means.values)
        with torch.no_grad():
            group.first.sae.b_dec[0] = math.nan
        with pytest.raises(NonFiniteLossError):
            group.step(TOKENS)
    assert {name: float(value) for name, value in group.course.means.values.items()} == {
        name: float(value) for name, value in before.items()
    }


def run(folder: Path, several: bool, **overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "objective": KLAndMSE(alpha_decay=0.9),
        "training_tokens": 8 * 48,
        "output_path": str(folder / "output"),
        "checkpoint_path": str(folder / "checkpoints"),
        "n_checkpoints": 1,
        "logger": EVERY_STEP,
    } | overrides
    if not several:
        cfg = runner_config(**settings)
        make_runner(cfg).run()
        return cfg
    sae = StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=L1)
    cfg = multi_config({"a": (Site.of_sae(EARLY), sae), "b": (Site.of_sae(LATE), copy.deepcopy(sae))}, **settings)
    make_multi_runner(cfg).run()
    return cfg


@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
def test_a_run_goes_on_with_the_mean_bit_for_bit(several: bool, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", several)
    checkpoint = Path(str(whole.checkpoint_path)) / "240"
    run(tmp_path / "resumed", several, resume_from_checkpoint=str(checkpoint))
    files = list((tmp_path / "whole" / "output").rglob("*.safetensors"))
    assert len(files) == 4 if several else 2
    for file in files:
        other = load_file(tmp_path / "resumed" / file.relative_to(tmp_path / "whole"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in load_file(file).items())
    histories = [pd.read_csv(tmp_path / name / "output" / "history.csv") for name in ("whole", "resumed")]
    column = "a/metrics/balanced_kl/alpha" if several else "metrics/balanced_kl/alpha"
    assert histories[0][column].tolist() == histories[1][column].tolist()
    # Were it not for what the checkpoint has, it would go on otherwise.
    for file in checkpoint.rglob(FILENAME):
        file.unlink()
    run(tmp_path / "forgetful", several, resume_from_checkpoint=str(checkpoint))
    forgetful = pd.read_csv(tmp_path / "forgetful" / "output" / "history.csv")[column].tolist()
    assert forgetful[:5] == histories[0][column].tolist()[:5]
    assert forgetful[6] != histories[0][column].tolist()[6]


def test_a_damaged_mean_is_named(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", several=False)
    checkpoint = Path(str(whole.checkpoint_path)) / "240"
    (checkpoint / FILENAME).write_bytes(b"{")
    with pytest.raises(ValueError, match=rf"{FILENAME} is damaged \(.*\); copy it again") as error:
        run(tmp_path / "resumed", several=False, resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(error.value)


def test_nothing_is_written_where_nothing_is_remembered(tmp_path: Path) -> None:
    run(tmp_path, several=False, objective=KLAndMSE())
    assert not list(tmp_path.rglob(FILENAME))


# What is logged and recorded


def test_the_history_has_the_plain_kl_and_alpha(tmp_path: Path) -> None:
    cfg = run(tmp_path, several=False, objective="kl_mse", store_batch_size_prompts=4)
    table = pd.read_csv(tmp_path / "output" / "history.csv")
    kl, mse, alpha = (table[name] for name in ("losses/kl", "losses/mse_loss", "metrics/balanced_kl/alpha"))
    assert alpha.tolist() == pytest.approx((mse / kl).tolist(), rel=1e-5)
    assert table["details/balanced_kl_coefficient"].eq(0.5).all()
    assert cfg.to_dict()["objective"] == {
        "name": "kl_mse",
        "kl_coefficient": 0.5,
        "mse_coefficient": 0.5,
        "alpha": None,
        "alpha_decay": 0.0,
    }
    assert make_objective(cfg.to_dict()["objective"]) == KLAndMSE()


def test_one_of_several_is_one_bit_for_bit() -> None:
    single = make_trainer(make_runner(runner_config(objective="kl_mse")))
    site = (Site.of_sae(EARLY), StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=L1))
    cfg: E2EMultiRunnerConfig = multi_config({"sae": site}, objective="kl_mse")
    joint = make_multi_runner(cfg, random_model()).make_group()
    assert torch.equal(single.sae.W_enc, joint.first.sae.W_enc)
    with single.group.model.running(), joint.model.running():
        single.step(TOKENS)
        joint.step(TOKENS)
    for name, tensor in single.sae.state_dict().items():
        assert torch.equal(tensor, joint.first.sae.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, r"kl_mse: alpha=0 must be a finite number above 0, or None"),
        ({"alpha": -1.0}, r"alpha=-1.0 must be a finite number above 0"),
        ({"alpha": math.inf}, r"alpha=inf must be a finite number"),
        ({"alpha": "1"}, r"alpha='1' must be a number, not str"),
        ({"alpha": True}, r"alpha=True must be a number, not bool"),
        ({"alpha_decay": 1.0}, r"alpha_decay=1.0 must be at least 0 and below 1"),
        ({"alpha_decay": -0.1}, r"alpha_decay=-0.1 must be at least 0"),
        ({"alpha_decay": math.nan}, r"alpha_decay=nan must be at least 0"),
        ({"alpha_decay": "0.9"}, r"alpha_decay='0.9' must be a number, not str"),
        ({"alpha": 1.0, "alpha_decay": 0.9}, r"alpha=1.0 is fixed and has no running mean"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLAndMSE(**settings)
    with pytest.raises(ValueError, match=message):
        make_objective({"name": "kl_mse", **settings})
