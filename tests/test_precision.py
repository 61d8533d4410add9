"""Half precision: the language model in bfloat16, by its weights or under autocast, beside an SAE, sums and Adam in float32."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from sae_lens import SAE, GatedTrainingSAEConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig, TrainingSAEConfig
from sae_lens.load_model import HookedProxyLM
from torch import Tensor

from sae_lens_e2e import E2ETrainer, E2ETrainingRunner, embedded
from sae_lens_e2e.splice import Site, SplicedModel, Where
from tests.models import any_model, dataset_of, hugging_face_model, random_tokens
from tests.test_loading import folder_with_tokenizer
from tests.training import EVERY_STEP, make_runner, make_trainer, multi_config, runner_config

HALVES = ("weights", "autocast")
TOKENS = random_tokens(4, 12, 61)

N_STEPS = 25
# As the documentation has them: relative, in the first step and in the mean of the last five; one step by itself is as good as noise.
TOLERANCES = {"loss": (0.01, 0.05), "kl": (0.02, 0.1)}


def settings_for(kind: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"logger": EVERY_STEP, "lr": 3e-3, "training_tokens": 100 * 48}
    if kind == "embedded":
        sae = TopKTrainingSAEConfig(d_in=64, d_sae=256, k=32)
        # Where a larger step or fewer features would make the same features take turns, and two runs drift apart by that alone.
        return settings | {"sae": sae, "lr": 2e-3, "hook_name": "blocks.3.hook_resid_pre"}
    if kind == "llama":
        return settings | {"hook_name": "model.layers.0", "model_class_name": "AutoModelForCausalLM"}
    return settings | {"model_class_name": kind}


def language_model(kind: str, half: str) -> Any:
    """A model as it is, or with its weights rounded."""
    model = embedded.load_model() if kind == "embedded" else any_model(kind)
    if half == "weights":
        (model.model if isinstance(model, HookedProxyLM) else model).to(torch.bfloat16)
    return model


class Trained:
    """Some steps on the same tokens: the losses of each, and the trainer."""

    def __init__(self, kind: str, half: str, n_steps: int = N_STEPS, **overrides: Any):
        tokens = torch.tensor(embedded.load_dataset()[:4]["input_ids"])[:, :128] if kind == "embedded" else TOKENS
        settings = settings_for(kind) | {"autocast_lm": half == "autocast", "context_size": tokens.shape[1]} | overrides
        settings["train_batch_size_tokens"] = tokens.numel()
        settings["training_tokens"] = 100 * tokens.numel()
        self.runner = make_runner(runner_config(**settings), language_model(kind, half), dataset_of(tokens))
        self.trainer: E2ETrainer[Any, Any] = make_trainer(self.runner)
        with self.runner.splice.running():
            self.outputs = [self.trainer.step(tokens) for _ in range(n_steps)]
        self.losses: list[Mapping[str, Tensor]] = [{"loss": out.loss, **out.losses} for out in self.outputs]


@functools.cache
def in_float32(kind: str) -> Trained:
    """What both kinds of half precision are compared with."""
    return Trained(kind, "none")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", ["HookedTransformer", "llama", "TransformerBridge", "embedded"])
def test_losses_stay_close_to_those_in_float32(kind: str, half: str) -> None:
    low, full = Trained(kind, half), in_float32(kind)
    assert float(low.losses[0]["kl"]) != float(full.losses[0]["kl"]), f"{half} changed nothing"
    for name, (at_first, in_the_end) in TOLERANCES.items():
        for steps, tolerance in ((slice(1), at_first), (slice(-5, None), in_the_end)):
            found, expected = (fmean(float(losses[name]) for losses in of.losses[steps]) for of in (low, full))
            assert found == pytest.approx(expected, rel=tolerance), (name, steps)
        assert low.losses[-1][name] < 0.6 * low.losses[0][name]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", ["HookedTransformer", "llama", "TransformerBridge"])
def test_sae_gradients_adam_and_losses_are_in_float32(kind: str, half: str) -> None:
    low = Trained(kind, half, n_steps=2)
    model, trainer = low.runner.splice, low.trainer
    gradients: list[Tensor] = []
    handle = trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad for p in trainer.sae.parameters() if p.grad is not None)
    )
    with model.running():
        trainer.step(TOKENS)
    handle.remove()
    state = [value for of in trainer.optimizer.state.values() for value in of.values()]
    losses = [value for output in low.losses for value in output.values()]
    assert len(gradients) == len(list(trainer.sae.parameters()))
    assert len(state) == 3 * len(gradients)
    for tensors in (gradients, state, losses, list(trainer.sae.parameters())):
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    # What the language model computes with is half as wide, and what is put into it is cast to that.
    products: list[torch.dtype] = []
    linear = next(module for name, module in model.model.named_modules() if name.endswith(("mlp", "mlp.down_proj")))
    handle = linear.register_forward_hook(lambda *args: products.append(args[-1].dtype))
    hook = low.runner.site.read
    with model.running(), trainer.group.plan.lm_autocast(torch.device("cpu")), torch.no_grad():
        clean = model.clean(TOKENS, [low.runner.site])
        given: list[torch.dtype] = []

        def replace(x: Tensor) -> dict[str, Tensor]:
            given.append(x.dtype)
            return {hook: x.float()}

        spliced = model.spliced(clean, Where.everywhere(TOKENS), {low.runner.site: replace}, [hook])
    handle.remove()
    assert set(products) == {torch.bfloat16}
    assert spliced.at[hook].dtype == clean.at[hook].dtype == given[0]
    assert half == "autocast" or given[0] == torch.bfloat16


def test_kl_is_summed_in_float32_over_a_half_precision_model() -> None:
    """In bfloat16 a divergence of 1e-3 nats would be lost: probabilities near 1 differ by 4e-3 at least."""
    model = SplicedModel(hugging_face_model("llama", torch.bfloat16))
    with model.running():
        clean = model.clean(TOKENS).final
    assert clean is not None
    assert clean.dtype == torch.bfloat16
    clean = clean.flatten(0, 1)
    changed = clean + 0.01 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
    found = model.unembedding.kl(changed, clean)
    log_p, log_q = (model.unembedding.logits(hidden).double().log_softmax(-1) for hidden in (clean, changed))
    assert found.dtype == torch.float32
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert 0 < expected < 1e-3
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_a_run_names_the_precision_of_its_model(tmp_path: Path) -> None:
    folder = folder_with_tokenizer(tmp_path / "llama")
    hugging_face_model("llama").model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    cfg = runner_config(
        **settings_for("llama") | {"training_tokens": 3 * 48},
        model_name=str(folder),
        model_from_pretrained_kwargs={"dtype": "bfloat16"},
        output_path=str(tmp_path / "out"),
    )
    runner = E2ETrainingRunner(cfg, override_dataset=dataset_of(random_tokens(32, 12, 61)))
    assert {p.dtype for p in runner.model.parameters()} == {torch.bfloat16}
    runner.run()
    saved = SAE.load_from_disk(tmp_path / "out")
    assert saved.dtype == saved.W_enc.dtype == torch.float32
    assert saved.cfg.metadata.model_from_pretrained_kwargs == {"dtype": "bfloat16"}
    assert json.loads((tmp_path / "out" / "runner_cfg.json").read_text())["dtype"] == "float32"


# Numbers that cannot be trained in


@pytest.mark.parametrize(
    ("sae", "autocast", "says"),
    [
        (StandardTrainingSAEConfig(d_in=16, d_sae=40, dtype="float16"), False, ["sae.dtype='float16'", "float32"]),
        (TopKTrainingSAEConfig(d_in=16, d_sae=40, k=4, dtype="torch.float16"), True, ["dtype='torch.float16'", "Adam"]),
        (StandardTrainingSAEConfig(d_in=16, d_sae=40, dtype="int8"), False, ["sae.dtype='int8'", "float32, bfloat16"]),
        (GatedTrainingSAEConfig(d_in=16, d_sae=40, dtype="bfloat16"), False, ["sae.dtype='bfloat16'", "autocast=True"]),
    ],
)
def test_an_sae_in_numbers_that_it_cannot_be_trained_in_is_refused(
    sae: TrainingSAEConfig, autocast: bool, says: list[str]
) -> None:
    settings: dict[str, Any] = {"autocast": autocast, "objective": "e2e"}
    saes = {"a": (Site.of_sae("blocks.1.hook_resid_pre"), sae), "b": (Site.of_sae("blocks.2.hook_resid_pre"), sae)}
    with pytest.raises(ValueError, match="dtype=") as error:
        runner_config(sae=sae, **settings)
    with pytest.raises(ValueError, match=r"saes\['a'\]\.dtype=") as of_several:
        multi_config(saes, **settings)
    assert "\n" not in str(error.value) + str(of_several.value)
    assert all(text in str(error.value) for text in says)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_others_train(dtype: str, autocast: bool) -> None:
    saes = {
        "standard": StandardTrainingSAEConfig(d_in=16, d_sae=40, dtype=dtype, l1_coefficient=0.02),
        "topk": TopKTrainingSAEConfig(d_in=16, d_sae=40, dtype=dtype, k=4),
        "gated": GatedTrainingSAEConfig(d_in=16, d_sae=40, dtype=dtype, l1_coefficient=0.02),
    }
    for name, sae in saes.items():
        if name == "gated" and dtype == "bfloat16" and not autocast:
            continue
        outputs = Trained("HookedTransformer", "none", sae=sae, autocast=autocast, objective="e2e", n_steps=10).losses
        assert outputs[-1]["loss"] < outputs[0]["loss"], name


def test_activations_have_no_numbers_of_their_own() -> None:
    """A field that would mean how SAELens stores activations, and might be taken for the language model's numbers."""
    with pytest.raises(ValueError, match=r"dtype='bfloat16': .*model_from_pretrained_kwargs=\{'dtype'") as error:
        runner_config(dtype="bfloat16")
    assert "\n" not in str(error.value)
    sae = StandardTrainingSAEConfig(d_in=16, d_sae=40, dtype="bfloat16")
    assert runner_config(sae=sae, dtype="bfloat16").dtype == "bfloat16"
