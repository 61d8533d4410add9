"""Transcoders: against the equations and plain PyTorch, as SAELens alone loads them, evaluated, and what is refused.

What is observed in training is the production loop: a runner's group, a real step, and the gradients that its optimizers are given.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, BatchTopKTrainingSAEConfig, HookedSAETransformer, LoggingConfig, StandardTrainingSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_e2e import E2E, E2EDownstream, E2EMultiRunnerConfig, Local, Objective, training_sae_from
from sae_lens_e2e.architectures.transcoder import TRANSCODERS, TranscoderStepInput
from sae_lens_e2e.cli import main
from sae_lens_e2e.evaluation import Evaluation, evaluate, evaluate_together
from sae_lens_e2e.publishing.neuronpedia import save_for_neuronpedia
from sae_lens_e2e.splice import Site, frozen
from tests.models import any_model, dataset_of, random_model, random_tokens, run_with_hooks
from tests.processes import run_stock
from tests.saes import randomised
from tests.test_joint_equations import assert_gradients, mask_of, naive_gradients
from tests.training import group_gradients, make_multi_runner, make_runner, multi_config, runner_config

TOKENS = random_tokens(4, 12, 61)
EXCLUDED = list(range(16))
NORMALIZED, POST, MLP_OUT = "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"

SETTINGS: dict[str, dict[str, Any]] = {
    "transcoder": {"l1_coefficient": 0.02},
    "skip_transcoder": {"l1_coefficient": 0.02},
    "batchtopk_transcoder": {"k": 3},
    "batchtopk_skip_transcoder": {"k": 3},
    "jumprelu_transcoder": {"l0_coefficient": 0.1, "jumprelu_bandwidth": 0.5},
    "jumprelu_skip_transcoder": {"l0_coefficient": 0.1, "jumprelu_bandwidth": 0.5},
}
SAVED_AS = {name: name.replace("batchtopk", "jumprelu") for name in SETTINGS}
every_architecture = pytest.mark.parametrize("architecture", SETTINGS)


def config(architecture: str, d_in: int = 16, d_out: int = 16, d_sae: int = 24, **settings: Any) -> Any:
    return TRANSCODERS[architecture][1](
        d_in=d_in, d_sae=d_sae, d_out=d_out, **copy.deepcopy(SETTINGS[architecture] | settings)
    )


def single(architecture: str = "transcoder", **overrides: Any) -> Any:
    """A runner config of one transcoder from the MLP's hidden layer, 32 wide, to what it adds to the stream, 16 wide."""
    settings = {"hook_name": POST, "hook_name_out": MLP_OUT, "objective": E2E(mse_coefficient=0.3), "lr": 3e-3}
    return runner_config(**({"sae": config(architecture, d_in=32)} | settings | overrides))


# Equations


def naive_output(sae: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Output and own loss of a transcoder by its equations, with gradients; the loss is over the positions in `mask`."""
    hidden = x @ sae.W_enc + sae.b_enc
    norm = sae.W_dec.norm(dim=-1)
    skip = x @ sae.W_skip.T if hasattr(sae, "W_skip") else 0
    architecture = sae.cfg.architecture()
    if "batchtopk" in architecture:
        scores = (hidden * norm).relu() * mask[..., None]
        n_kept = sae.cfg.k * int(mask.sum())
        smallest = scores.flatten().topk(n_kept).values.min()
        features = scores * (scores >= smallest)
        return (features / norm) @ sae.W_dec + sae.b_dec + skip, torch.tensor(0.0)
    if "jumprelu" in architecture:
        threshold: Tensor
        threshold, width = sae.threshold, sae.cfg.jumprelu_bandwidth
        above = (hidden > threshold).float()
        near = (((hidden - threshold) / width).abs() < 0.5).float()
        # 0, with the gradient of the straight-through estimator.
        ghost = (threshold - threshold.detach()) * near / width
        features = hidden * above - threshold.detach() * ghost
        l0 = (above - ghost).sum(-1)[mask].mean()
        return features @ sae.W_dec + sae.b_dec + skip, sae.cfg.l0_coefficient * l0
    features = hidden.relu()
    l1 = (features * norm).sum(-1)[mask].mean()
    return features @ sae.W_dec + sae.b_dec + skip, sae.cfg.l1_coefficient * l1


def naive_loss(model: Any, sites: Mapping[str, Site], saes: Mapping[str, Any], objective: Any, mask: Tensor) -> Tensor:
    """The objective with all transcoders in, by whole passes with plain hooks: each is given the changed stream, and is held against the clean one."""
    written = [site.writes[0] for site in sites.values()]
    reads = [site.read for site in sites.values()]
    clean_logits, clean = run_with_hooks(model, TOKENS, {}, [*written, *reads, *objective.hooks])
    own: list[Tensor] = []
    mse: list[Tensor] = []
    put: dict[str, Tensor] = {}

    def read(name: str) -> Any:
        def at_read(activation: Tensor) -> Tensor:
            given = clean[sites[name].read] if isinstance(objective, Local) else activation
            output, own_loss = naive_output(saes[name], given, mask)
            own.append(own_loss)
            mse.append(((output - clean[sites[name].writes[0]]) ** 2).sum(-1)[mask].mean())
            put[name] = output
            return activation

        return at_read

    def write(name: str) -> Any:
        return lambda activation: torch.where(mask[..., None], put[name], activation)

    change = {sites[name].read: read(name) for name in saes} | {sites[name].writes[0]: write(name) for name in saes}
    logits, spliced = run_with_hooks(model, TOKENS, change, objective.hooks)
    loss = torch.stack(own).sum() + getattr(objective, "mse_coefficient", 1.0) * torch.stack(mse).sum()
    if isinstance(objective, E2E | E2EDownstream):
        log_p, log_q = clean_logits.log_softmax(-1), logits.log_softmax(-1)
        loss = loss + objective.kl_coefficient * (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()
    if isinstance(objective, E2EDownstream):
        errors = [((spliced[hook] - clean[hook])[mask] ** 2).mean() for hook in objective.hooks]
        loss = loss + objective.downstream_coefficient * sum(errors) / len(errors)
    return loss


SITES: dict[str, dict[str, Site]] = {
    "HookedTransformer": {
        "late": Site(NORMALIZED, (MLP_OUT,)),
        "early": Site("blocks.0.ln2.hook_normalized", ("blocks.0.hook_mlp_out",)),
    },
    "TransformerBridge": {
        "late": Site("blocks.1.hook_resid_mid", (MLP_OUT,)),
        "early": Site("blocks.0.hook_resid_mid", ("blocks.0.hook_mlp_out",)),
    },
    "llama": {
        "late": Site("model.layers.1.post_attention_layernorm", ("model.layers.1.mlp",)),
        "early": Site("model.layers.0.post_attention_layernorm", ("model.layers.0.mlp",)),
    },
}


@pytest.mark.parametrize(
    ("architecture", "kind", "objective", "masked"),
    [
        ("transcoder", "HookedTransformer", Local(), False),
        ("transcoder", "llama", E2E(mse_coefficient=0.3), True),
        ("skip_transcoder", "HookedTransformer", E2EDownstream(0.2, 1.7, mse_coefficient=0.1), True),
        ("skip_transcoder", "TransformerBridge", E2E(), False),
        ("batchtopk_transcoder", "HookedTransformer", E2E(mse_coefficient=0.3), False),
        ("batchtopk_transcoder", "llama", E2EDownstream(0.2, 1.7, mse_coefficient=0.1), True),
        ("batchtopk_skip_transcoder", "TransformerBridge", Local(), True),
        ("jumprelu_transcoder", "HookedTransformer", E2E(mse_coefficient=0.3), True),
        ("jumprelu_transcoder", "llama", Local(), False),
        ("jumprelu_skip_transcoder", "llama", E2E(0.7, 0.2), False),
    ],
    ids=lambda v: v.name if isinstance(v, Objective) else str(v),
)
def test_transcoders_match_the_equations(architecture: str, kind: str, objective: Objective, masked: bool) -> None:
    sites = SITES[kind]
    runner = make_multi_runner(
        multi_config(
            {name: (site, config(architecture)) for name, site in sites.items()},
            objective=objective,
            model_class_name=kind if "Transformer" in kind else "AutoModelForCausalLM",
            exclude_special_tokens=EXCLUDED if masked else False,
            seqpos_slice=(2, None) if masked else (None,),
            store_batch_size_prompts=4,
            train_batch_size_tokens=4 * (10 if masked else 12),
        ),
        any_model(kind),
    )
    saes = {name: randomised(sae, seed=i) for i, (name, sae) in enumerate(runner.saes.items())}
    with frozen(runner.model):
        loss = naive_loss(runner.model, sites, saes, runner.objective, mask_of(masked))
        expected = naive_gradients(loss, saes)
    group = runner.make_group()
    with runner.splice.running():
        found = group_gradients(group, TOKENS)
        group.step(TOKENS)
    assert_gradients(found, expected, 1e-5)
    for output in group.outputs.values():
        torch.testing.assert_close(output.loss, loss.detach(), rtol=1e-6, atol=0)


@every_architecture
def test_from_one_width_to_another(architecture: str) -> None:
    runner = make_runner(single(architecture, store_batch_size_prompts=4))
    sae: Any = randomised(runner.sae)
    site, objective = Site(POST, (MLP_OUT,)), runner.objective
    with frozen(runner.model):
        loss = naive_loss(runner.model, {"sae": site}, {"sae": sae}, objective, mask_of(False))
        expected = naive_gradients(loss, {"sae": sae})
    with runner.splice.running():
        assert_gradients(group_gradients(runner.make_group(), TOKENS), expected, 1e-5)


def test_dead_features_are_to_predict_what_the_output_has_missed_of_the_target() -> None:
    torch.manual_seed(0)
    sae: Any = randomised(TRANSCODERS["batchtopk_transcoder"][0](config("batchtopk_transcoder", d_out=10)))
    x, target, dead = torch.randn(20, 16), torch.randn(20, 10), torch.arange(24) % 2 == 0
    output = sae.training_forward_pass(TranscoderStepInput(x, {}, dead, 0, False, target))
    out, _ = naive_output(sae, x, torch.ones(20, dtype=torch.bool))
    torch.testing.assert_close(output.sae_out, out)
    # Gao et al. (2024), appendix A.2: the d_out / 2 dead features that would fire most, without b_dec.
    hidden = (x @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=-1)
    strongest = hidden.where(dead, -torch.inf).topk(5)
    features = torch.zeros_like(hidden).scatter(-1, strongest.indices, strongest.values)
    missed = ((features / sae.W_dec.norm(dim=-1)) @ sae.W_dec - (target - out).detach()).square().sum(-1).mean()
    torch.testing.assert_close(output.losses["auxiliary_reconstruction_loss"], missed)
    torch.testing.assert_close(output.losses["mse_loss"], (out - target).square().sum(-1).mean())
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    # From which SAELens logs the explained variance.
    assert torch.equal(output.sae_in, target)


@every_architecture
def test_how_it_starts(architecture: str) -> None:
    sae: Any = make_runner(single(architecture)).sae
    assert sae.W_enc.shape == (32, 24)
    assert sae.W_dec.shape == (24, 16)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((24,), 0.1))
    torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.full((24,), 0.1))
    assert not sae.b_dec.any()
    assert sae.b_dec.shape == (16,)
    assert ("skip" in architecture) == hasattr(sae, "W_skip")
    if hasattr(sae, "W_skip"):
        assert sae.W_skip.shape == (16, 32)
        assert not sae.W_skip.any()


@every_architecture
def test_training_lowers_the_loss_and_changes_every_parameter(architecture: str) -> None:
    trainer = make_runner(single(architecture)).make_trainer()
    before = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    with frozen(trainer.group.model.model):
        losses = [trainer.step(TOKENS).losses for _ in range(15)]
    assert float(losses[-1]["kl"]) < float(losses[0]["kl"])
    for name, parameter in trainer.sae.named_parameters():
        assert bool(parameter.isfinite().all()), name
        assert not torch.equal(parameter, before[name]), name


# Saved, and loaded by SAELens alone

ALONE = """
import json, sys, torch
from sae_lens import SAE
x = torch.load("x.pt")
for name in sys.argv[1:]:
    sae = SAE.load_from_disk(name)
    with torch.no_grad():
        torch.save(sae(x), f"{name}/y.pt")
    print(type(sae).__name__, sae.cfg.architecture(), sae.cfg.d_out, sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out)
assert not [name for name in sys.modules if name.startswith("sae_lens_e2e")]
"""


def test_what_is_saved_is_sae_lens_own_and_computes_the_same_in_it(tmp_path: Path) -> None:
    x = torch.randn(30, 32, generator=torch.Generator().manual_seed(3))
    torch.save(x, tmp_path / "x.pt")
    trained: dict[str, Any] = {}
    for name in SETTINGS:
        runner = make_runner(single(name, output_path=str(tmp_path / name), training_tokens=3 * 48))
        randomised(runner.sae)
        trained[name] = runner.run().eval()
    done = run_stock(ALONE, *SETTINGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, line in zip(SETTINGS, done.stdout.splitlines(), strict=True):
        class_name = SAE_CLASS_REGISTRY[SAVED_AS[name]][0].__name__
        assert line.split() == [class_name, SAVED_AS[name], "16", POST, MLP_OUT]
        sae, found = trained[name], torch.load(tmp_path / name / "y.pt")
        with torch.no_grad():
            expected = sae(x)
            if "batchtopk" in name:
                # The top k of a batch become a threshold.
                hidden = (x @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=-1)
                features = hidden.relu() * (hidden > float(sae.topk_threshold))
                expected = sae.output_of(features, x)
                assert 0 < float((features > 0).float().mean()) < 1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert json.loads((tmp_path / name / "cfg.json").read_text())["metadata"]["training_architecture"] == name


def test_sae_lens_splices_it_in_as_we_do() -> None:
    # Of one with a skip, SAELens' HookedSAETransformer (6.54) leaves the skip out.
    runner = make_runner(single("jumprelu_transcoder", training_tokens=2 * 48))
    randomised(runner.sae)
    sae = _stock(runner.run())
    model = random_model()
    found = evaluate(sae, model, dataset_of(TOKENS), batch_size_prompts=4, verbose=False)
    theirs: Any = HookedSAETransformer(model.cfg)
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = theirs.run_with_saes(TOKENS, saes=[sae])
    surprise = -logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])
    assert found.ce_loss_with_sae == pytest.approx(float(surprise.mean()), rel=1e-5)


def _stock(sae: Any) -> SAE[Any]:
    from sae_lens_e2e.publishing.neuronpedia import stock_sae

    return stock_sae(sae)


def test_going_on_from_a_saved_one_computes_the_same() -> None:
    x = torch.randn(30, 32)
    for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        runner = make_runner(single(name, training_tokens=48))
        randomised(runner.sae)
        saved = _stock(runner.run())
        again: Any = training_sae_from(saved)
        assert again.cfg.architecture() == name
        with torch.no_grad():
            torch.testing.assert_close(again(x), saved(x))
        make_runner(single(sae=again.cfg, training_tokens=48), sae=again).run()


@pytest.mark.parametrize("architecture", ["batchtopk_transcoder", "jumprelu_skip_transcoder"])
def test_resumed_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    def cfg(name: str, **overrides: Any) -> Any:
        return single(architecture, output_path=str(tmp_path / name), training_tokens=6 * 48, **overrides)

    make_runner(cfg("straight", checkpoint_path=str(tmp_path / "at"), n_checkpoints=2)).run()
    (checkpoint, *_) = sorted((tmp_path / "at").glob("*/*/trainer_state.pt"), key=lambda p: int(p.parent.name))
    make_runner(cfg("resumed", resume_from_checkpoint=str(checkpoint.parent))).run()
    straight, resumed = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    with pytest.raises(ValueError, match=r"hook_name_out='blocks.2.hook_mlp_out', but resume_from_checkpoint"):
        make_runner(cfg("other", resume_from_checkpoint=str(checkpoint.parent), hook_name_out="blocks.2.hook_mlp_out"))


def test_configs_come_back_from_json() -> None:
    one = single()
    again = type(one).from_dict(json.loads(json.dumps(one.to_dict())))
    assert again.hook_name_out == MLP_OUT
    assert again.sae.to_dict() == one.sae.to_dict()
    several = multi_config(
        {"mlp": (Site.of_sae(NORMALIZED), config("skip_transcoder")), "sae": (Site.of_sae(MLP_OUT), _SAE)},
        hook_names_out={"mlp": "blocks.2.hook_mlp_out"},
    )
    again = E2EMultiRunnerConfig.from_dict(json.loads(json.dumps(several.to_dict())))
    assert (
        again.sites
        == several.sites
        == {
            "mlp": Site(NORMALIZED, ("blocks.2.hook_mlp_out",)),
            "sae": Site.of_sae(MLP_OUT),
        }
    )


_SAE = StandardTrainingSAEConfig(d_in=16, d_sae=20)


# Evaluated


def transcoder(hook: str = POST, hook_out: str = MLP_OUT, d_in: int = 32, seed: int = 0, **metadata: Any) -> SAE[Any]:
    sae_class, config_class = SAE_CLASS_REGISTRY["jumprelu_skip_transcoder"]
    sae: Any = sae_class(config_class(d_in=d_in, d_sae=24, d_out=16, apply_b_dec_to_input=False))  # pyright: ignore[reportCallIssue]
    place = {"hook_name": hook, "hook_name_out": hook_out, "context_size": 12, "prepend_bos": False}
    for key, value in (place | metadata).items():
        sae.cfg.metadata[key] = value
    return randomised(sae, seed)


def naive_pass(model: Any, saes: Mapping[str, Any], mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits with transcoders in wherever the mask says, and the outputs, by plain hooks."""
    put: dict[str, Tensor] = {}

    def read(sae: Any, out: str) -> Any:
        def at_read(activation: Tensor) -> Tensor:
            put[out] = sae(activation)
            return activation

        return at_read

    change: dict[str, Any] = {}
    for sae in saes.values():
        out = sae.cfg.metadata.hook_name_out
        change[sae.cfg.metadata.hook_name] = read(sae, out)
        change[out] = lambda activation, out=out: torch.where(mask[..., None], put[out], activation)
    with torch.no_grad():
        return run_with_hooks(model, TOKENS, change)[0].log_softmax(-1), put


@pytest.mark.parametrize("excluded", [[], EXCLUDED], ids=["all", "excluded"])
def test_evaluation_is_of_what_it_writes(excluded: list[int]) -> None:
    model, sae = random_model(), transcoder(exclude_special_tokens=excluded)
    found = evaluate(sae, model, dataset_of(TOKENS), batch_size_prompts=2, verbose=False)
    mask = ~torch.isin(TOKENS, torch.tensor(excluded))
    with torch.no_grad():
        clean, at = run_with_hooks(model, TOKENS, {}, [MLP_OUT])
        zeros, _ = run_with_hooks(model, TOKENS, {MLP_OUT: torch.zeros_like})
    log_q, put = naive_pass(model, {"sae": sae}, mask)
    labels, known = TOKENS[:, 1:, None], mask[:, :-1]

    def ce(log_p: Tensor) -> float:
        return float(-log_p[:, :-1].gather(-1, labels)[..., 0][known].mean())

    assert found.ce_loss_without_sae == pytest.approx(ce(clean.log_softmax(-1)), rel=1e-5)
    assert found.ce_loss_with_sae == pytest.approx(ce(log_q), rel=1e-5)
    assert found.ce_loss_with_ablation == pytest.approx(ce(zeros.log_softmax(-1)), rel=1e-5)
    x, x_hat = at[MLP_OUT][mask], put[MLP_OUT][mask]
    assert found.at_hook.mse == pytest.approx(float(((x_hat - x) ** 2).mean()), rel=1e-5)
    explained = 1 - float(((x_hat - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())
    assert found.at_hook.explained_variance == pytest.approx(explained, rel=1e-4)
    assert list(found.layers) == [MLP_OUT, "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]
    assert (found.hook_name, found.hook_name_out) == (POST, MLP_OUT)
    assert list(found.downstream_mse) == ["blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_one_in_training_is_evaluated_as_it_is_saved() -> None:
    runner = make_runner(single("jumprelu_skip_transcoder", training_tokens=48))
    randomised(runner.sae)
    trained = runner.run()
    options = {"batch_size_prompts": 4, "verbose": False}
    one, other = (evaluate(sae, random_model(), dataset_of(TOKENS), **options) for sae in (trained, _stock(trained)))
    assert one.ce_loss_with_sae == pytest.approx(other.ce_loss_with_sae, rel=1e-6)
    assert one.l0 == other.l0


@pytest.mark.parametrize("excluded", [[], EXCLUDED], ids=["all", "excluded"])
def test_several_together_see_each_other(excluded: list[int]) -> None:
    """Tokens that are excluded have the activation that the model computes from the changed stream, not the clean one."""
    model = random_model()
    early = transcoder("blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out", 16, 1, exclude_special_tokens=excluded)
    saes = {"late": transcoder(exclude_special_tokens=excluded), "early": early}
    found = evaluate_together(saes, model, dataset_of(TOKENS), batch_size_prompts=4, verbose=False)
    mask = ~torch.isin(TOKENS, torch.tensor(excluded))
    log_q, _ = naive_pass(model, saes, mask)
    surprise = -log_q[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]
    assert [one.saes for one in found.together] == [("early",), ("early", "late")]
    assert found.together[-1].ce_loss == pytest.approx(float(surprise[mask[:, :-1]].mean()), rel=1e-5)


def test_training_evaluation_and_publishing_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = tmp_path / "sae"
    flags = {
        **{"architecture": "batchtopk_transcoder", "d_in": 64, "d_out": 64, "d_sae": 64, "k": 4},
        **{"model_name": "embedded", "dataset_path": "embedded", "objective": "e2e", "context_size": 32},
        **{"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"},
        **{"store_batch_size_prompts": 4, "train_batch_size_tokens": 128, "training_tokens": 384},
        **{"output_path": sae, "log_to_wandb": False, "checkpoint_path": tmp_path / "checkpoints", "verbose": False},
    }
    assert main(["train", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]) == 0
    assert main(["evaluate", str(sae), "--max-tokens", "2048", "--batch-size-prompts", "8"]) == 0
    evaluation = json.loads((sae / "evaluation.json").read_text())
    assert (evaluation["hook_name"], evaluation["hook_name_out"]) == (flags["hook_name"], flags["hook_name_out"])
    assert next(iter(evaluation["layers"])) == flags["hook_name_out"]
    assert "batchtopk" not in capsys.readouterr().err
    # A run's own settings repeat it.
    assert main(["train", "--config", str(sae / "runner_cfg.json"), "--output_path", str(tmp_path / "again")]) == 0
    one, other = (load_file(folder / "sae_weights.safetensors") for folder in (sae, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    written = save_for_neuronpedia(SAE.load_from_disk(sae), tmp_path / "written")
    assert SAE.load_from_disk(written).cfg.metadata.hook_name_out == flags["hook_name_out"]


def test_several_by_name(tmp_path: Path) -> None:
    cfg = multi_config(
        {
            "mlp": (Site.of_sae(NORMALIZED), config("skip_transcoder")),
            "resid": (Site.of_sae("blocks.2.hook_resid_pre"), StandardTrainingSAEConfig(d_in=16, d_sae=20)),
        },
        hook_names_out={"mlp": MLP_OUT},
        objective="e2e",
        output_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False),
    )
    make_multi_runner(cfg).run()
    mlp, resid = (SAE.load_from_disk(tmp_path / name) for name in ("mlp", "resid"))
    assert mlp.cfg.metadata.hook_name_out == MLP_OUT
    assert resid.cfg.metadata.hook_name_out is None
    companion = {"hook_name": NORMALIZED, "hook_head_index": None, "hook_name_out": MLP_OUT}
    assert resid.cfg.metadata.companions == {"mlp": companion}
    found = evaluate_together({"mlp": mlp, "resid": resid}, random_model(), dataset_of(TOKENS), batch_size_prompts=4)
    assert [one.saes for one in found.together] == [("mlp",), ("mlp", "resid")]


# Refused


def refused(match: str, make: Any) -> None:
    with pytest.raises(ValueError, match=match) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_configs_that_are_refused() -> None:
    of_the_sae: list[tuple[dict[str, Any], str]] = [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input=True: a transcoder's b_dec"),
        (
            {"normalize_activations": "layer_norm"},
            "normalize_activations='layer_norm': a transcoder's input and output",
        ),
        ({"normalize_activations": "expected_average_only_in"}, "leave it at 'none'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
    ]
    for settings, match in of_the_sae:
        refused(match, lambda settings=settings: config("batchtopk_transcoder", **settings))
    with pytest.raises(TypeError, match="d_out"):
        TRANSCODERS["transcoder"][1](d_in=16, d_sae=24)  # pyright: ignore[reportCallIssue]
    sae = StandardTrainingSAEConfig(d_in=16, d_sae=24)
    refused(r"^hook_name_out is not set, and a transcoder reads 'blocks.1.mlp", lambda: single(hook_name_out=None))
    refused(r"^hook_name_out='blocks.1.hook_mlp_out': the architecture 'standard' stands for", lambda: single(sae=sae))
    refused(r"^hook_name_out='.*' is the hook that it reads", lambda: single(hook_name_out=POST))
    refused(r"^hook_head_index=1: a transcoder takes all heads", lambda: single(hook_head_index=1))
    refused(r"^d_out=0 must be at least 1", lambda: single(sae=config("transcoder", d_out=0)))
    refused(
        "downstream_hooks: blocks.1.hook_resid_pre is not downstream",
        lambda: single(objective=E2EDownstream(downstream_hooks=("blocks.1.hook_resid_pre",))),
    )
    both = {"mlp": (Site.of_sae(POST), config("transcoder", 32)), "sae": (Site.of_sae("blocks.2.hook_resid_pre"), sae)}

    def several(**hooks_out: str) -> Any:
        return lambda: multi_config(both, hook_names_out=hooks_out or None)

    refused(r"^hook_names_out\['mlp'\] is not set", several())
    refused(r"^hook_names_out\['sae'\]='.*': the architecture 'standard'", several(mlp=MLP_OUT, sae=MLP_OUT))
    refused(r"^hook_names_out names 'mpl', which is not in saes", several(mlp=MLP_OUT, mpl=MLP_OUT))
    refused(r"^hook_names_out=3 must be", lambda: multi_config(both, hook_names_out=3))


def test_what_does_not_fit_the_model() -> None:
    refused(
        r"^sae.d_out=12 does not fit blocks.1.hook_mlp_out, which is 16 wide; set d_out=16",
        lambda: make_runner(single(sae=config("transcoder", 32, 12))),
    )
    refused(r"^sae.d_in=16 does not fit blocks.1.mlp.hook_post", lambda: make_runner(single(sae=config("transcoder"))))
    refused(
        r"^hook_name='blocks.1.hook_mlp_out' comes after hook_name_out='blocks.0.hook_mlp_out'",
        lambda: make_runner(single(sae=config("transcoder"), hook_name=MLP_OUT, hook_name_out="blocks.0.hook_mlp_out")),
    )
    refused(
        r"^hook_name_out: the model has no hook 'blocks.1.hook_mlp_ou'; did you mean blocks.1.hook_mlp_out",
        lambda: make_runner(single(hook_name_out="blocks.1.hook_mlp_ou")),
    )
    refused(
        "metadata.hook_name_out is not set",
        lambda: evaluate(transcoder(hook_name_out=None), random_model(), dataset_of(TOKENS), batch_size_prompts=4),
    )
    sae: Any = make_runner(single()).sae
    with pytest.raises(TypeError, match=r"use sae_lens_e2e.E2ETrainingRunner, with hook_name_out"):
        sae.training_forward_pass(TrainStepInput(torch.zeros(3, 32), {"l1": 1.0}, None, 0, False))
    with pytest.raises(ValueError, match=r"sae.d_out=16, but the SAE given as override_sae has 8"):
        make_runner(single(), sae=TRANSCODERS["transcoder"][0](config("transcoder", 32, 8)))


def test_an_sae_is_none_of_them() -> None:
    """The loop trains both kinds in one pass, and an SAE's target stays what it was given."""
    sae = BatchTopKTrainingSAEConfig(d_in=16, d_sae=24, k=3)
    runner = make_runner(runner_config(sae=sae, objective="local"))
    output = runner.make_trainer().step(TOKENS)
    with torch.no_grad():
        x = random_model().run_with_cache(TOKENS)[1]["blocks.1.hook_resid_pre"].flatten(0, 1)[-24:]
    torch.testing.assert_close(output.sae_in, x)
