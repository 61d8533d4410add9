"""What a token costs: counted from shapes, against PyTorch's own counter of what was run."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from sae_lens import StandardTrainingSAEConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sae_lens_e2e import E2E, CrossEntropy, E2EDownstream, KLAndMSE, Local, Objective, Stage
from sae_lens_e2e.architectures.transcoder import SkipTrainingTranscoderConfig
from sae_lens_e2e.objectives import Batch, Term
from sae_lens_e2e.splice import Site, SplicedModel, frozen
from sae_lens_e2e.splice.flops import ModelFlops
from sae_lens_e2e.training.cost import check_countable, flops_per_token, training_flops
from sae_lens_e2e.training.group import Group
from tests.models import any_model, block_output, random_model, random_tokens
from tests.training import make_multi_runner, make_runner, multi_config, runner_config

N_POS = 12


def counted(group: Group, d_vocab: int) -> float:
    """FLOPs of an optimizer step, by PyTorch, a token. Fused attention is written out, for on a CPU it is not counted."""
    tokens = random_tokens(4, N_POS, d_vocab)
    written_out = sdpa_kernel(SDPBackend.MATH)
    with frozen(group.model.model), written_out, FlopCounterMode(display=False) as counter:
        group.step(tokens)
    return counter.get_total_flops() / tokens.numel()


def expected(group: Group, context_size: int = N_POS) -> float:
    saes: dict[str, Any] = {name: trainer.sae.cfg for name, trainer in group.trainers.items()}
    return flops_per_token(group.objective, group.model, saes, group.sites, context_size)


@pytest.mark.parametrize(
    ("objective", "hook"),
    [
        (Local(), "blocks.1.hook_resid_pre"),
        (E2E(), "blocks.1.hook_resid_pre"),
        (E2E(mse_coefficient=1.0), "blocks.2.hook_mlp_out"),
        (E2EDownstream(), "blocks.1.hook_resid_pre"),
        (E2EDownstream(kl_coefficient=0.0), "blocks.0.hook_resid_post"),
        (CrossEntropy(), "blocks.0.hook_resid_pre"),
        (KLAndMSE(), "blocks.1.hook_resid_pre"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_token_costs_what_pytorch_counts(objective: Objective, hook: str) -> None:
    group = make_runner(runner_config(objective=objective, hook_name=hook)).make_group()
    assert expected(group) == pytest.approx(counted(group, 61), rel=0.03)


def sae(d_in: int = 16, **settings: Any) -> StandardTrainingSAEConfig:
    return StandardTrainingSAEConfig(d_in=d_in, d_sae=40, l1_coefficient=0.02, **settings)


@pytest.mark.parametrize("splices", [("all",), ("all", "each_alone")], ids="+".join)
def test_several_at_once_cost_their_passes(splices: tuple[str, ...]) -> None:
    """The later SAE's encoder is differentiated by its input too, where it is spliced in with the earlier one."""
    saes = {"late": ("blocks.2.hook_resid_pre", 2), "early": ("blocks.0.hook_resid_pre", 0)}
    cfg = multi_config(
        {name: (Site.of_sae(hook), sae()) for name, (hook, _) in saes.items()}, objective=E2E(splices=splices)
    )
    group = make_multi_runner(cfg).make_group()
    assert expected(group) == pytest.approx(counted(group, 61), rel=0.03)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "TransformerBridge"])
def test_any_kind_of_model_is_counted(kind: str) -> None:
    model = any_model(kind)
    splice = SplicedModel(model)
    for hook in (block_output(kind, 0), block_output(kind, 1)):
        cfg = multi_config({"sae": (Site.of_sae(hook), sae(d_model(splice, hook)))}, objective="e2e")
        group = make_multi_runner(cfg, splice=splice).make_group()
        assert expected(group) == pytest.approx(counted(group, 61), rel=0.03)


def d_model(splice: SplicedModel, hook: str) -> int:
    return splice.clean(splice.probe_tokens(4), hooks=[hook], final=False).at[hook].shape[-1]


def test_a_transcoder_and_its_skip() -> None:
    config = SkipTrainingTranscoderConfig(d_in=16, d_out=16, d_sae=40, l1_coefficient=0.02)
    site = Site.between("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
    group = make_multi_runner(multi_config({"mlp": (site, config)}, objective=E2E())).make_group()
    assert expected(group) == pytest.approx(counted(group, 61), rel=0.03)


def test_by_hand() -> None:
    """A block is 4 d² + 2 d d_mlp weights, and attention over 12 positions of 4 heads that are 4 wide."""
    model = SplicedModel(random_model())
    weights, attention = 4 * 16 * 16 + 2 * 16 * 32, 4 * N_POS * 16
    lm = ModelFlops(model, N_POS)
    assert lm.forward(0, 1) == 2 * weights + attention
    assert lm.backward(1, 3) == 2 * (2 * weights + 2 * attention)
    assert lm.unembedding == 2 * 16 * 61
    at = {"sae": Site.of_sae("blocks.1.hook_resid_pre")}
    of_sae = 2 * (2 + 3) * 16 * 40
    config = sae(apply_b_dec_to_input=False)
    assert flops_per_token(Local(), model, {"sae": config}, at, N_POS) == lm.forward(0, 1) + of_sae
    end_to_end = lm.forward(0, 3) + lm.forward(1, 3) + lm.backward(1, 3) + 3 * lm.unembedding + of_sae
    assert flops_per_token(E2E(), model, {"sae": config}, at, N_POS) == end_to_end
    # Of six positions that are run through the model three are trained on.
    assert flops_per_token(Local(), model, {"sae": config}, at, 6, 3) == 2 * ModelFlops(model, 6).forward(0, 1) + of_sae


def test_stages_cost_what_each_does_over_its_steps() -> None:
    runner = make_runner(
        runner_config(objective=[Stage("local", until=0.6), Stage("e2e", lr=1e-3)], training_tokens=10 * 48)
    )
    parts = [
        flops_per_token(one, runner.splice, {"sae": runner.cfg.sae}, {"sae": runner.site}, N_POS)
        for one in (Local(), E2E())
    ]
    assert parts[1] > 1.5 * parts[0]
    assert training_flops(runner.cfg, runner.objective, runner.splice) == 48 * (6 * parts[0] + 4 * parts[1])
    runner.make_group()
    assert runner.sae.cfg.metadata.training_flops == training_flops(runner.cfg, runner.objective, runner.splice)
    assert runner.sae.cfg.metadata.training_tokens == 480


@dataclass(frozen=True)
class Silent(Objective):
    """A plugin's, which compares logits and does not say how."""

    name: ClassVar[str] = "silent"

    def terms(self, batch: Batch) -> dict[str, Term]:
        return {"kl": Term(1.0, lambda: batch.kl())}


def test_an_objective_that_does_not_say_its_passes_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"objective 'silent' \(Silent of tests.test_cost\) does not say its logit_products"
    ):
        check_countable(Silent())
    check_countable(KLAndMSE())
    assert E2E(kl_coefficient=0.0, mse_coefficient=1.0).logit_products == 0
