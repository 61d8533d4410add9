"""Sparse modules that do not fit their model, or each other, are refused in one line that names the field."""

import re
from typing import Any

import pytest
import torch

from sae_lens_e2e.splice import Site, SplicedModel, check_sites
from tests.models import ANY, any_model, block_output, inside_block, random_model

RESID_PRE, MLP_OUT, Z = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
DOWNSTREAM = ("blocks.2.hook_resid_pre", "blocks.2.attn.hook_z", "blocks.2.hook_resid_post")


def check(model: Any, *sites: Site, hooks: tuple[str, ...] = (), widths: dict[str, int] | None = None) -> None:
    by_name = {f"sae{i}": site for i, site in enumerate(sites)}
    widths = {name: 4 if site.head_index is not None else 16 for name, site in by_name.items()} | (widths or {})
    check_sites(SplicedModel(model), by_name, {name: (width, width) for name, width in widths.items()}, hooks)


@pytest.mark.filterwarnings("ignore:.*could not tell its unembedding:UserWarning")
@pytest.mark.parametrize("kind", ANY)
def test_modules_that_fit_pass_and_nothing_has_changed(kind: str) -> None:
    model = any_model(kind).train()
    before = {id(p) for p in model.parameters() if p.requires_grad}
    mlp, earlier = inside_block(kind, 1)
    sites = [Site.of_sae(mlp), Site.of_sae(earlier), Site.of_sae(block_output(kind, 0))]
    check(model, *sites, hooks=(block_output(kind, 1),))
    check(model, Site(block_output(kind, 0), (mlp,)), hooks=(block_output(kind, 2),))
    assert model.training
    assert {id(p) for p in model.parameters() if p.requires_grad} == before
    assert all(p.grad is None for p in model.parameters())
    if hasattr(model, "hook_dict"):
        assert not any(hook.has_hooks() for hook in model.hook_dict.values())


# Hooks


@pytest.mark.parametrize(
    ("field", "hook", "downstream", "says"),
    [
        ("hook_name", "blocks.1.hook_resid_prr", (), "did you mean blocks.1.hook_resid_pre"),
        ("hook_name", "blocks.9.hook_resid_pre", (), "did you mean blocks."),
        ("hook_name", "????", (), "it has for instance hook_embed"),
        ("downstream_hooks", RESID_PRE, ("blocks.2.hook_resid",), "did you mean blocks.2.hook_resid_"),
    ],
)
def test_hooks_that_there_are_not(field: str, hook: str, downstream: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: the model has no hook") as error:
        check(random_model(), Site.of_sae(hook), hooks=downstream)
    assert says in str(error.value)
    assert repr(downstream[0] if downstream else hook) in str(error.value)


@pytest.mark.parametrize(
    ("hook", "downstream"),
    [("blocks.1.hook_mlp_in", ()), ("blocks.1.attn.hook_result", ()), (RESID_PRE, ("blocks.2.hook_mlp_in",))],
)
def test_hooks_that_the_models_settings_leave_out(hook: str, downstream: tuple[str, ...]) -> None:
    # TransformerLens has these hook points in every model, and calls them with use_hook_mlp_in or use_attn_result only.
    with pytest.raises(ValueError, match=f"has a hook '{downstream[0] if downstream else hook}' but does not call it"):
        check(random_model(), Site.of_sae(hook), hooks=downstream)


@pytest.mark.parametrize(
    ("hook", "downstream"),
    [
        (RESID_PRE, RESID_PRE),
        (MLP_OUT, "blocks.1.attn.hook_z"),
        (MLP_OUT, "blocks.1.hook_resid_mid"),
        (RESID_PRE, "blocks.0.hook_mlp_out"),
        (RESID_PRE, "hook_embed"),
        ("blocks.1.hook_resid_post", MLP_OUT),
        ("ln_final.hook_normalized", "blocks.2.hook_resid_post"),
    ],
)
def test_compared_hooks_that_are_not_downstream(hook: str, downstream: str) -> None:
    with pytest.raises(ValueError, match=f"^downstream_hooks: {downstream} is not downstream of hook_name='{hook}'"):
        check(random_model(), Site.of_sae(hook), hooks=(downstream,))


def test_a_compared_hook_that_only_one_of_the_modules_changes() -> None:
    # It lies between the two: the error names the one that comes after it.
    with pytest.raises(ValueError, match=f"{RESID_PRE} is not downstream of sae1: hook_name='{MLP_OUT}'"):
        check(random_model(), Site.of_sae("blocks.0.hook_mlp_out"), Site.of_sae(MLP_OUT), hooks=(RESID_PRE,))


def test_a_compared_hook_by_another_of_the_bridges_names_for_the_place_itself() -> None:
    model = any_model("TransformerBridge")
    assert model.hook_dict["blocks.1.hook_in"] is model.hook_dict[RESID_PRE]
    with pytest.raises(ValueError, match=f"blocks.1.hook_in is not downstream of hook_name='{RESID_PRE}'"):
        check(model, Site.of_sae(RESID_PRE), hooks=("blocks.1.hook_in",))


def test_a_module_on_which_the_output_does_not_depend() -> None:
    model: Any = any_model("llama")
    model.model.idle = torch.nn.Linear(16, 16)
    model.model.model.layers[1].register_forward_hook(lambda *args: (model.model.idle(args[-1]), None)[1])
    with pytest.raises(ValueError, match="hook_name='idle': the model's output does not depend on it"):
        check(model, Site.of_sae("idle"))


@pytest.mark.parametrize(
    ("kind", "hook", "width", "shape"),
    [
        ("HookedTransformer", "blocks.1.attn.hook_pattern", 49, (2, 4, 7, 7)),
        ("mixtral", "model.layers.1.mlp.gate", 4, (14, 4)),
        ("llama", "model.rotary_emb", 4, (1, 7, 4)),
    ],
)
def test_a_hook_that_has_no_activation_for_each_token(kind: str, hook: str, width: int, shape: tuple[int, ...]) -> None:
    says = re.escape(f"{hook} has no activation for each token; for (2, 7) of them it is {shape}")
    with pytest.raises(ValueError, match=f"hook_name: {says}"):
        check(any_model(kind), Site.of_sae(hook), widths={"sae0": width})
    with pytest.raises(ValueError, match=f"downstream_hooks: {says}"):
        check(any_model(kind), Site.of_sae(block_output(kind, 0)), hooks=(hook,))


# Widths and heads


@pytest.mark.parametrize(
    ("hook", "head", "d_in", "says"),
    [
        (RESID_PRE, None, 12, "sae.d_in=12 does not fit blocks.1.hook_resid_pre, .*set d_in=16"),
        (Z, None, 4, "set d_in=16"),
        (Z, 1, 16, "set d_in=4"),
        (MLP_OUT, 0, 16, "hook_head_index=0: blocks.1.hook_mlp_out has no heads.*None"),
        (Z, 4, 4, "hook_head_index=4: blocks.1.attn.hook_z has 4 heads"),
        (Z, -9, 4, "hook_head_index=-9"),
    ],
)
def test_widths_and_heads_that_do_not_fit(hook: str, head: int | None, d_in: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(random_model(), Site.of_sae(hook, head), widths={"sae0": d_in})
    with pytest.raises(ValueError, match=f"sae0: .*{says}"):  # of several, the one that it is
        check(random_model(), Site.of_sae(hook, head), Site.of_sae("blocks.2.hook_resid_pre"), widths={"sae0": d_in})


# Modules that do not fit each other


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("HookedTransformer", Site.of_sae(MLP_OUT), Site.of_sae(MLP_OUT)),
        ("HookedTransformer", Site.of_sae(Z, 1), Site.of_sae(Z, 1)),
        ("HookedTransformer", Site.of_sae(Z, 1), Site.of_sae(Z)),
        ("HookedTransformer", Site(RESID_PRE, (MLP_OUT,)), Site.of_sae(MLP_OUT)),
        ("TransformerBridge", Site.of_sae("blocks.1.hook_out"), Site.of_sae("blocks.1.hook_resid_post")),
        ("llama", Site.of_sae("model.layers.1"), Site.of_sae("model.layers.1")),
    ],
)
def test_two_that_write_one_place(kind: str, first: Site, second: Site) -> None:
    with pytest.raises(
        ValueError, match=f"^sae0 and sae1 both write {first.writes[0]}, and only transcoders' outputs add"
    ):
        check(any_model(kind), first, second)


def test_two_that_write_one_place_and_may() -> None:
    check(random_model(), Site.of_sae(Z, 1), Site.of_sae(Z, 2))
    check(random_model(), Site(RESID_PRE, (MLP_OUT,)), Site("blocks.0.hook_mlp_out", (MLP_OUT,)))


@pytest.mark.parametrize(
    ("kind", "read", "write"),
    [
        ("HookedTransformer", "blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"),
        ("HookedTransformer", "blocks.2.hook_resid_pre", "blocks.0.hook_mlp_out"),
        ("llama", "model.layers.1.mlp", "model.layers.0.mlp"),
    ],
)
def test_one_that_reads_after_its_own_write(kind: str, read: str, write: str) -> None:
    said = f"^hook_name='{read}' comes after hook_name_out='{write}', and a transcoder writes later than it reads; swap them"
    with pytest.raises(ValueError, match=said):
        check(any_model(kind), Site(read, (write,)))


def test_frozen_is_undone_when_something_is_refused() -> None:
    model = random_model().train()
    with pytest.raises(ValueError, match="set d_in=16"):
        check(model, Site.of_sae(RESID_PRE), widths={"sae0": 3})
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()
