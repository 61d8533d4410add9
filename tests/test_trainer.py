"""The trainer: micro-batches that add up, SAELens' own step repeated exactly, statistics, and what is refused."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from transformer_lens import HookedTransformer
from typing_extensions import override

from sae_lens_e2e import E2E, Batch, E2EDownstream, E2ETrainer, Local, NonFiniteLossError, Objective, Term
from sae_lens_e2e.splice import frozen
from sae_lens_e2e.training.output import StepOutput
from tests.models import dataset_of, random_model, random_tokens
from tests.training import EVERY_STEP, make_runner, make_trainer, runner_config

HOOK = "blocks.1.hook_resid_pre"
N_PROMPTS, N_POS, D_VOCAB = 4, 12, 61
STEP_TOKENS = N_PROMPTS * N_POS
EXCLUDED = list(range(20))

FLOAT64: dict[str, Any] = {"d_in": 16, "d_sae": 40, "dtype": "float64"}
# Few enough active features that some are dead after one step with a window of 0.
TOPK: dict[str, Any] = {"d_in": 16, "d_sae": 128, "k": 2}
SAME_AS_SAE_LENS: dict[str, TrainingSAEConfig] = {
    "standard": StandardTrainingSAEConfig(**FLOAT64, l1_coefficient=0.02, l1_warm_up_steps=2),
    "topk": TopKTrainingSAEConfig(**TOPK, dtype="float64"),
    "jumprelu": JumpReLUTrainingSAEConfig(
        **FLOAT64, l0_coefficient=0.1, pre_act_loss_coefficient=0.01, jumprelu_init_threshold=0.3, l0_warm_up_steps=2
    ),
}


def float64_model() -> HookedTransformer:
    return random_model(dtype=torch.float64)


def step_batches(n_steps: int, seed: int = 3) -> list[Tensor]:
    return list(random_tokens(n_steps * N_PROMPTS, N_POS, D_VOCAB, seed).split(N_PROMPTS))


def hook_activations(model: HookedTransformer, tokens: Tensor) -> Tensor:
    """(prompts, pos, d_in) at HOOK, as TransformerLens computes them."""
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]


def train(trainer: E2ETrainer[Any, Any], batches: list[Tensor]) -> list[StepOutput]:
    """One step on each batch, counted as `fit` counts them."""
    outputs = []
    with frozen(trainer.group.model.model):
        for tokens in batches:
            outputs.append(trainer.step(tokens))
            trainer.n_training_steps += 1
    return outputs


def assert_same_parameters(first: TrainingSAE[Any], second: TrainingSAE[Any], rtol: float, atol: float) -> None:
    theirs = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# Gradient accumulation


@pytest.mark.parametrize(
    "masking", [{}, {"exclude_special_tokens": EXCLUDED}], ids=["all tokens", "different counts a prompt"]
)
@pytest.mark.parametrize("objective", ["local", "e2e", "e2e_ds"])
def test_micro_batches_add_up_to_the_whole_batch(objective: str, masking: dict[str, Any]) -> None:
    batches = step_batches(3)
    batches[1][2] = 5  # an excluded token everywhere: a forward pass with nothing to train on
    if masking:
        counts = (~torch.isin(batches[0], torch.tensor(EXCLUDED))).sum(1)
        assert len(set(counts.tolist())) > 1
    trainers, outputs = [], []
    for prompts_per_forward in (1, 4):
        cfg = runner_config(
            sae=SAME_AS_SAE_LENS["standard"],
            objective=objective,
            store_batch_size_prompts=prompts_per_forward,
            max_grad_norm=0.05,
            lr=1e-2,
            **masking,
        )
        trainers.append(make_trainer(make_runner(cfg, float64_model())))
        outputs.append(train(trainers[-1], batches))
    for one, four in zip(*outputs, strict=True):
        torch.testing.assert_close(one.loss, four.loss, rtol=1e-9, atol=0)
        for name, value in four.losses.items():
            torch.testing.assert_close(one.losses[name], value, rtol=1e-9, atol=1e-12)
        for name, value in four.parts.items():
            torch.testing.assert_close(one.parts[name], value, rtol=1e-9, atol=0)
        norms: list[Any] = [one.metrics["grad_norm"], four.metrics["grad_norm"]]
        assert float(norms[1]) > 0.05, "clipping was not at work"
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-9, atol=0)
        assert one.n_tokens == four.n_tokens
        torch.testing.assert_close(one.firing, four.firing)
    assert_same_parameters(trainers[0].sae, trainers[1].sae, rtol=1e-7, atol=1e-9)
    start = make_runner(runner_config(sae=SAME_AS_SAE_LENS["standard"]), float64_model()).sae
    assert not torch.allclose(start.W_enc, trainers[0].sae.W_enc, atol=1e-3)


# The same step as SAELens' own trainer


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@pytest.mark.parametrize("architecture", SAME_AS_SAE_LENS)
def test_local_steps_are_sae_lens_own(architecture: str, masked: bool) -> None:
    model = float64_model()
    cfg = runner_config(
        sae=SAME_AS_SAE_LENS[architecture],
        objective=Local(),
        store_batch_size_prompts=N_PROMPTS,
        dead_feature_window=0,
        lr=1e-2,
        lr_warm_up_steps=3,
        exclude_special_tokens=EXCLUDED if masked else False,
    )
    ours = make_trainer(make_runner(cfg, model))
    stock: SAETrainer[Any, Any] = SAETrainer(cfg.to_e2e_trainer_config(), copy.deepcopy(ours.sae), iter(()))
    aux = []
    for tokens in step_batches(3):
        mask = ~torch.isin(tokens, torch.tensor(EXCLUDED)) if masked else torch.ones_like(tokens, dtype=torch.bool)
        theirs = stock._train_step(stock.sae, hook_activations(model, tokens)[mask])
        stock.n_training_steps += 1
        (mine,) = train(ours, [tokens])

        torch.testing.assert_close(mine.loss, theirs.loss.detach(), rtol=1e-7, atol=0)
        assert mine.losses.keys() == theirs.losses.keys()
        for name, value in theirs.losses.items():
            torch.testing.assert_close(mine.losses[name], value.detach(), rtol=1e-7, atol=1e-12)
        aux.append(sum(float(value.detach()) for name, value in theirs.losses.items() if name != "mse_loss"))
        assert_same_parameters(ours.sae, stock.sae, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(ours.act_freq_scores, stock.act_freq_scores, check_dtype=False)
        torch.testing.assert_close(ours.n_forward_passes_since_fired, stock.n_forward_passes_since_fired)
        assert ours.optimizer.param_groups[0]["lr"] == stock.optimizer.param_groups[0]["lr"]
        assert ours.get_coefficients() == stock.get_coefficients()
        if not masked:
            assert ours.n_frac_active_samples == stock.n_frac_active_samples
    assert aux[-1] > 0, "the architecture's own terms never occurred"
    assert ours.feature_sparsity.max() > 0
    if architecture != "standard":
        assert bool(ours.dead_neurons.any())


# Statistics


@pytest.mark.parametrize("prompts_per_forward", [1, 2, 4])
def test_statistics_count_tokens_and_optimizer_steps(prompts_per_forward: int) -> None:
    model = random_model()
    cfg = runner_config(
        sae=TopKTrainingSAEConfig(**TOPK),
        store_batch_size_prompts=prompts_per_forward,
        exclude_special_tokens=EXCLUDED,
    )
    trainer = make_trainer(make_runner(cfg, model))
    scores = torch.zeros(128)
    since_fired = torch.zeros(128)
    n_tokens = 0
    for tokens in step_batches(3):
        mask = ~torch.isin(tokens, torch.tensor(EXCLUDED))
        with torch.no_grad():
            fired = trainer.sae.encode(hook_activations(model, tokens)[mask]) > 0
        (output,) = train(trainer, [tokens])
        scores += fired.sum(0)
        since_fired = torch.where(fired.any(0), torch.zeros(128), since_fired + 1)
        n_tokens += int(mask.sum())
        torch.testing.assert_close(output.firing, fired.sum(0).float())
        torch.testing.assert_close(trainer.act_freq_scores, scores)
        torch.testing.assert_close(trainer.n_forward_passes_since_fired, since_fired)
        assert trainer.n_frac_active_samples == n_tokens
    assert n_tokens < 3 * STEP_TOKENS
    assert since_fired.max() == 3
    assert trainer.n_training_samples == 3 * STEP_TOKENS


def test_sparse_activations_are_trained_on_and_counted_as_dense_ones() -> None:
    def trained(sparse: bool) -> tuple[E2ETrainer[Any, Any], list[StepOutput]]:
        # Rescaled sparse activations have no backward pass in PyTorch on a CPU, SAELens' own trainer included.
        sae = TopKTrainingSAEConfig(**TOPK, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=False)
        trainer = make_trainer(make_runner(runner_config(sae=sae, dead_feature_window=0)))
        return trainer, train(trainer, step_batches(3))

    (sparse, sparse_outputs), (dense, dense_outputs) = trained(True), trained(False)
    assert sparse_outputs[-1].feature_acts.is_sparse
    assert not dense_outputs[-1].feature_acts.is_sparse
    for ours, theirs in zip(sparse_outputs, dense_outputs, strict=True):
        torch.testing.assert_close(ours.loss, theirs.loss)
        torch.testing.assert_close(ours.firing, theirs.firing)
        log = sparse.build_train_step_log_dict(ours, 0)
        assert log["metrics/l0"] == pytest.approx(float(theirs.firing.sum()) / STEP_TOKENS)
    assert dense.feature_sparsity.max() > 0
    torch.testing.assert_close(sparse.act_freq_scores, dense.act_freq_scores)
    torch.testing.assert_close(sparse.n_forward_passes_since_fired, dense.n_forward_passes_since_fired)
    assert_same_parameters(sparse.sae, dense.sae, rtol=1e-4, atol=1e-5)


# Which tokens


@pytest.mark.parametrize("seqpos_slice", [(None,), (2,), (2, -1), (1, 9, 2)])
@pytest.mark.parametrize("excluded", [False, EXCLUDED], ids=["none excluded", "some excluded"])
def test_only_wanted_tokens_are_trained_on(seqpos_slice: tuple[int | None, ...], excluded: bool | list[int]) -> None:
    model = random_model()
    kept = range(N_POS)[slice(*seqpos_slice)]
    cfg = runner_config(
        seqpos_slice=seqpos_slice,
        exclude_special_tokens=excluded,
        store_batch_size_prompts=N_PROMPTS,
        train_batch_size_tokens=N_PROMPTS * len(kept),
    )
    trainer = make_trainer(make_runner(cfg, model))
    (tokens,) = step_batches(1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for position in kept:
        mask[:, position] = True
    if excluded:
        mask &= tokens >= len(EXCLUDED)
    (output,) = train(trainer, [tokens])
    assert output.n_tokens == int(mask.sum()) == trainer.n_frac_active_samples
    torch.testing.assert_close(output.sae_in, hook_activations(model, tokens)[mask], rtol=1e-5, atol=1e-5)
    assert trainer.n_training_samples == N_PROMPTS * len(kept)


def test_seqpos_slice_counts_the_tokens_inside_it() -> None:
    runner = make_runner(
        runner_config(seqpos_slice=(2, -2), train_batch_size_tokens=4 * 8, training_tokens=5 * 32),
    )
    trainer = make_trainer(runner)
    trainer.fit()
    assert trainer.n_training_steps == 5
    # The store counts a row when the next one is asked for.
    assert runner.activations_store.n_dataset_processed == 5 * 4 - 1


def test_a_batch_with_nothing_to_train_on_is_refused() -> None:
    trainer = make_trainer(make_runner(runner_config(exclude_special_tokens=EXCLUDED)))
    before = copy.deepcopy(trainer.sae.state_dict())
    with pytest.raises(ValueError, match="exclude_special_tokens"):
        train(trainer, [torch.zeros(N_PROMPTS, N_POS, dtype=torch.long)])
    assert all(torch.equal(value, before[name]) for name, value in trainer.sae.state_dict().items())
    assert trainer.n_frac_active_samples == 0


# The language model's weights


@dataclass(frozen=True)
class Watching(E2E):
    """e2e, noting at every forward pass the state that the language model is in."""

    model: Any = None
    seen: list[tuple[bool, bool]] = field(default_factory=list)
    fails: bool = False

    @override
    def terms(self, batch: Batch) -> dict[str, Term]:
        parameters = list(self.model.parameters())
        self.seen.append(
            (
                any(p.requires_grad or p.grad is not None for p in parameters),
                any(m.training for m in self.model.modules()),
            )
        )
        if self.fails:
            raise ArithmeticError("on purpose")
        return super().terms(batch)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}


@pytest.mark.parametrize("fails", [False, True], ids=["trained", "failed"])
def test_the_language_model_takes_no_gradient_and_is_put_back(fails: bool) -> None:
    model = random_model()
    model.train()
    model.blocks[2].eval()
    model.pos_embed.W_pos.requires_grad_(False)
    training = [module.training for module in model.modules()]
    wants_grad = [parameter.requires_grad for parameter in model.parameters()]
    weights = copy.deepcopy(model.state_dict())
    # Through a dictionary of its own, for asdict would copy the model.
    objective = Watching(fails=fails)
    object.__setattr__(objective, "model", model)
    cfg = runner_config(objective="e2e")
    runner = make_runner(cfg, model)
    runner.objective = objective
    if fails:
        with pytest.raises(ArithmeticError):
            runner.run()
    else:
        runner.run()
    assert objective.seen == [(False, False)] * (1 if fails else 10)
    assert [module.training for module in model.modules()] == training
    assert [parameter.requires_grad for parameter in model.parameters()] == wants_grad
    assert len(set(training)) == len(set(wants_grad)) == 2
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# Losses that are not finite


def poison_encoder(trainer: E2ETrainer[Any, Any]) -> None:
    trainer.sae.W_enc.data[0, 0] = float("nan")


def poison_language_model(trainer: E2ETrainer[Any, Any]) -> None:
    trainer.group.model.model.blocks[2].mlp.b_out.data[0] = float("inf")  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue, reportCallIssue]


@pytest.mark.parametrize("poison", [poison_encoder, poison_language_model])
@pytest.mark.parametrize(
    "sae",
    [StandardTrainingSAEConfig(d_in=16, d_sae=40), BatchTopKTrainingSAEConfig(**TOPK)],
    ids=lambda sae: sae.architecture(),
)
def test_a_step_that_is_not_finite_changes_nothing(
    sae: TrainingSAEConfig, poison: Callable[[E2ETrainer[Any, Any]], None]
) -> None:
    trainer = make_trainer(make_runner(runner_config(sae=sae)))
    batches = step_batches(4)
    train(trainer, batches[:3])
    poison(trainer)
    weights = copy.deepcopy(trainer.sae.state_dict())
    optimizer = copy.deepcopy(trainer.optimizer.state_dict())
    schedule = trainer.lr_scheduler.state_dict()["last_epoch"]
    firing = trainer.act_freq_scores.clone()
    with pytest.raises(NonFiniteLossError, match=r"step 3: the loss is nan.*not updated.*lower lr"):
        train(trainer, batches[3:])
    for name, value in trainer.sae.state_dict().items():
        assert torch.equal(value.nan_to_num(-1e9), weights[name].nan_to_num(-1e9)), name
    assert trainer.lr_scheduler.state_dict()["last_epoch"] == schedule
    assert trainer.n_training_steps == 3
    assert torch.equal(trainer.act_freq_scores, firing)
    for index, state in trainer.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, optimizer["state"][index][name]), name
    assert all(p.grad is None or not p.grad.any() for p in trainer.sae.parameters())


def test_the_checkpoint_before_a_step_that_is_not_finite_is_intact(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training_tokens": 250, "n_checkpoints": 5, "output_path": str(tmp_path / "output")}
    cfg = runner_config(lr=1e30, checkpoint_path=str(tmp_path / "checkpoints"), **settings)
    with pytest.raises(NonFiniteLossError, match="step 1:"):
        make_runner(cfg).run()
    assert cfg.checkpoint_path is not None
    assert [path.name for path in Path(cfg.checkpoint_path).iterdir()] == ["48"]
    checkpoint = Path(cfg.checkpoint_path) / "48"
    assert all(bool(p.isfinite().all()) for p in TrainingSAE.load_from_disk(checkpoint).parameters())
    assert not (tmp_path / "output").exists()
    resumed = make_trainer(make_runner(runner_config(lr=1e-3, **settings)))
    resumed.load_trainer_state(checkpoint)
    assert resumed.n_training_samples == 48


# What is logged


def test_log_of_a_step_has_every_term_over_all_its_tokens() -> None:
    hooks = ("blocks.2.hook_resid_pre", "blocks.2.hook_resid_post")
    objective = E2EDownstream(kl_coefficient=0.7, downstream_coefficient=1.3, downstream_hooks=hooks)
    logs = {}
    for prompts_per_forward in (1, 4):
        cfg = runner_config(
            sae=StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.3, l1_warm_up_steps=4),
            objective=objective,
            store_batch_size_prompts=prompts_per_forward,
            logger=EVERY_STEP,
        )
        trainer = make_trainer(make_runner(cfg))
        (output,) = train(trainer, step_batches(1))
        log = logs[prompts_per_forward] = trainer.build_train_step_log_dict(output, 48)
        assert log["metrics/l0"] == pytest.approx(float(output.firing.sum()) / STEP_TOKENS)
    one, four = logs[1], logs[4]
    losses = {"losses/overall_loss", "losses/kl", "losses/downstream_mse", "losses/mse_loss", "losses/l1_loss"}
    losses |= {f"metrics/downstream_mse/{hook}" for hook in hooks} | {"metrics/l0", "metrics/grad_norm"}
    assert losses <= one.keys()
    for name in losses - {"losses/l1_loss"}:
        assert one[name] == pytest.approx(four[name], rel=1e-4), name
        assert one[name] > 0, name
    assert one["losses/l1_loss"] == 0, "the coefficient is 0 in the first step of its warm-up"
    mean = sum(one[f"metrics/downstream_mse/{hook}"] for hook in hooks) / 2
    assert one["losses/downstream_mse"] == pytest.approx(mean, rel=1e-5)
    assert one["losses/overall_loss"] == pytest.approx(0.7 * one["losses/kl"] + 1.3 * mean, rel=1e-5)
    assert one["details/kl_coefficient"] == 0.7
    assert one["details/downstream_mse_coefficient"] == 1.3
    assert one["details/mse_loss_coefficient"] == 0
    assert one["details/l1_coefficient"] == pytest.approx(0.3 / 4)
    assert one["details/n_training_samples"] == 48


# Architectures that keep a loss to themselves


class HidingSAE(StandardTrainingSAE):
    """A standard SAE that adds its sparsity to the loss without naming it."""

    @override
    def calculate_aux_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Tensor:
        return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)["l1_loss"]


@pytest.mark.parametrize("l1_coefficient", [1.0, 0.01], ids=["large", "small beside the reconstruction"])
@pytest.mark.parametrize("objective", ["local", "e2e"])
def test_an_architecture_that_hides_a_term_is_refused_by_name(objective: str, l1_coefficient: float) -> None:
    cfg = runner_config(
        sae=StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=l1_coefficient), objective=objective
    )
    trainer = make_trainer(make_runner(cfg, sae=HidingSAE(cfg.sae)))
    with pytest.raises(TypeError, match=r"'standard' adds to its loss what it does not list"):
        train(trainer, step_batches(1))


def test_a_term_that_is_named_is_not_refused_under_low_precision() -> None:
    cfg = runner_config(
        sae=StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=1.0, dtype="bfloat16"), autocast=True
    )
    (output,) = train(make_trainer(make_runner(cfg)), step_batches(1))
    assert bool(output.loss.isfinite())


# Precision


@pytest.mark.parametrize("setting", ["autocast", "autocast_lm"])
def test_autocast_stays_close_to_float32(setting: str) -> None:
    def trained(enabled: bool) -> tuple[Tensor, E2ETrainer[Any, Any]]:
        trainer = make_trainer(make_runner(runner_config(**{setting: enabled}, lr=1e-2)))
        return torch.stack([output.loss for output in train(trainer, step_batches(5))]), trainer

    (low, low_trainer), (full, full_trainer) = trained(True), trained(False)
    assert not torch.equal(low, full), f"{setting} changed nothing"
    torch.testing.assert_close(low, full, rtol=0.05, atol=0)
    assert {p.dtype for p in low_trainer.sae.parameters()} == {torch.float32}
    difference = (low_trainer.sae.W_dec - full_trainer.sae.W_dec).norm() / full_trainer.sae.W_dec.norm()
    assert float(difference.detach()) < 0.1


# Normalised activations


def raw_reconstruction(sae: TrainingSAE[Any], scaler: ActivationScaler, x: Tensor) -> Tensor:
    with torch.no_grad():
        return scaler.unscale(sae.eval()(scaler.scale(x)))


@pytest.mark.parametrize("objective", ["local", "e2e"])
@pytest.mark.parametrize("normalize", ["expected_average_only_in", "layer_norm", "covariance_whitening"])
def test_normalised_activations_are_trained_on_and_folded_away(normalize: str, objective: str, tmp_path: Path) -> None:
    model = random_model()
    cfg = runner_config(
        sae=StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.02, normalize_activations=normalize),  # pyright: ignore[reportArgumentType]
        objective=objective,
        n_batches_for_norm_estimate=2,
        output_path=str(tmp_path),
        lr=1e-2,
        **({} if normalize == "layer_norm" else {"n_batches_in_buffer": 8}),
    )
    runner = make_runner(cfg, model)
    trainer = make_trainer(runner)
    start = copy.deepcopy(trainer.sae)
    trainer.estimate_activation_statistics(iter(runner.activations_store))
    estimated = trainer.activation_scaler.scaling_factor is not None or trainer.activation_scaler.whitening is not None
    assert estimated == (normalize != "layer_norm")
    outputs = train(trainer, 5 * step_batches(1))
    assert outputs[-1].loss < outputs[0].loss
    x = hook_activations(model, random_tokens(8, N_POS, D_VOCAB, seed=9)).flatten(0, 1)
    sae, scaler = copy.deepcopy(trainer.sae), copy.deepcopy(trainer.activation_scaler)
    expected = raw_reconstruction(sae, scaler, x)
    last_pass = hook_activations(model, step_batches(1)[0])[2:].flatten(0, 1)
    torch.testing.assert_close(outputs[0].sae_in, scaler(last_pass), rtol=1e-4, atol=1e-4)
    if objective == "e2e":
        # What is spliced in is in the language model's own units.
        with torch.no_grad():
            tokens = step_batches(1)[0]
            activation = hook_activations(model, tokens)
            x_hat = raw_reconstruction(start, scaler, activation.flatten(0, 1)).reshape(activation.shape)
            logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda _, hook: x_hat)])  # noqa: ARG005
            log_p, log_q = model(tokens).log_softmax(-1), logits.log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        torch.testing.assert_close(outputs[0].losses["kl"], kl, rtol=1e-3, atol=1e-5)

    assert trainer.n_training_samples == cfg.training_tokens, "fit has nothing left to do but fold"
    runner.save_final_sae(trainer.fit(), str(tmp_path), trainer.log_feature_sparsity)
    saved = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        found = saved(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert saved.cfg.normalize_activations == ("layer_norm" if normalize == "layer_norm" else "none")
    assert not torch.allclose(found, start(x), atol=0.1)


# Checkpoints are whole or not there


def test_a_checkpoint_that_fails_half_way_leaves_the_one_before(tmp_path: Path) -> None:
    cfg = runner_config(checkpoint_path=str(tmp_path))
    trainer = make_trainer(make_runner(cfg, dataset=dataset_of(random_tokens(64, N_POS, D_VOCAB))))
    train(trainer, step_batches(1))
    assert cfg.checkpoint_path is not None
    folder = Path(cfg.checkpoint_path)
    trainer.save_checkpoint("first")
    names = sorted(path.name for path in (folder / "first").iterdir())
    before = {path.name: path.read_bytes() for path in (folder / "first").iterdir()}
    assert names == [
        "activation_scaler.json",
        "activations_store_state.safetensors",
        "cfg.json",
        "history.csv",
        "runner_cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "trainer_state.pt",
    ]
    train(trainer, step_batches(1))

    def disk_full(checkpoint_path: Path | None) -> None:
        assert checkpoint_path is not None
        assert not (folder / "second").exists()
        assert (checkpoint_path / "trainer_state.pt").exists()
        raise OSError("no space left on device")

    trainer.save_checkpoint_fn = disk_full
    for name in ("first", "second"):
        with pytest.raises(OSError, match="no space left"):
            trainer.save_checkpoint(name)
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert {path.name: path.read_bytes() for path in (folder / "first").iterdir()} == before


def test_objectives_in_use_are_the_ones_asked_for() -> None:
    objectives: list[Objective] = [Local(), E2E(), E2EDownstream()]
    for objective in objectives:
        cfg = runner_config(objective=objective, logger=EVERY_STEP)
        (output,) = train(make_trainer(make_runner(cfg)), step_batches(1))
        expected = {"local": set(), "e2e": {"kl"}, "e2e_ds": {"kl", "downstream_mse"}}[objective.name]
        assert set(output.losses) == expected | {"mse_loss", "l1_loss"}
