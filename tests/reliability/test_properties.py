"""Whatever is written in a config, for an objective or in a sweep file: it means what it says, or is refused in one line."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import StandardTrainingSAEConfig, TopKTrainingSAEConfig

from sae_lens_e2e import E2ERunnerConfig
from sae_lens_e2e.errors import one_line
from sae_lens_e2e.markdown import plain
from sae_lens_e2e.names import is_folder_name
from sae_lens_e2e.objectives.plugins import make_objective
from sae_lens_e2e.sweep import read_sweep
from tests.training import runner_config

few = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck.__members__.values())
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["1e-3", "-1", "cpu", "constant", "", "blocks.1.hook_resid_pre", "local", "a\nb"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
# Those that name what is on this machine or write to it are not drawn.
FIELDS = [
    *("lr", "lr_end", "lr_warm_up_steps", "lr_decay_steps", "lr_scheduler_name", "n_restart_cycles", "adam_beta1"),
    *("seed", "n_checkpoints", "dead_feature_window", "feature_sampling_window", "dead_feature_threshold", "dtype"),
    *("context_size", "training_tokens", "store_batch_size_prompts", "train_batch_size_tokens", "max_grad_norm"),
    *(
        "seqpos_slice",
        "exclude_special_tokens",
        "hook_name",
        "hook_head_index",
        "model_kwargs",
        "streaming",
        "objective",
    ),
    *("sequence_separator_token", "n_batches_in_buffer", "eval_batch_size_prompts", "device", "llm_device", "logger"),
    *("n_batches_for_norm_estimate", "autocast", "compile_llm", "prefetch_llm_batches", "use_cached_activations"),
]
SAE_FIELDS = ["d_in", "d_sae", "k", "aux_loss_coefficient", "normalize_activations", "decoder_init_norm", "device"]


def said_in_one_line(error: Exception) -> None:
    assert str(error).strip(), "nothing is said"
    assert "\n" not in str(error), str(error)


def same(left: Any, right: Any) -> bool:
    """Equal as JSON has it; NaN is NaN."""
    return json.dumps(left, sort_keys=True, default=str) == json.dumps(right, sort_keys=True, default=str)


@few
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_a_config_means_what_it_says_or_is_refused_in_one_line(fields: dict[str, Any]) -> None:
    try:
        cfg = runner_config(**fields)
    except (ValueError, TypeError) as error:
        said_in_one_line(error)
        return
    assert cfg.training_tokens >= 1
    assert math.isfinite(cfg.lr)
    assert cfg.lr >= 0
    assert cfg.prompts_per_step * cfg.trained_context_size == cfg.train_batch_size_tokens
    again = E2ERunnerConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert same(again.to_dict(), cfg.to_dict())


@few
@given(st.dictionaries(st.sampled_from(SAE_FIELDS), VALUES, min_size=1, max_size=2))
def test_so_do_the_settings_of_an_sae(fields: dict[str, Any]) -> None:
    try:
        settings: dict[str, Any] = {"d_in": 16, "d_sae": 40, "k": 4} | fields
        sae = TopKTrainingSAEConfig(**settings)
    except Exception:
        # SAELens' own refusals.
        return
    try:
        cfg = runner_config(sae=sae)
    except (ValueError, TypeError) as error:
        said_in_one_line(error)
        return
    assert 1 <= cfg.sae.k <= cfg.sae.d_sae
    assert cfg.sae.d_in >= 1


@few
@given(
    st.one_of(
        VALUES,
        st.fixed_dictionaries(
            {"name": st.sampled_from(["local", "e2e", "e2e_ds", "ce", "none", ""]) | SCALARS},
            optional={
                "kl_coefficient": VALUES,
                "mse_coefficient": VALUES,
                "downstream_coefficient": VALUES,
                "downstream_hooks": VALUES,
                "x": VALUES,
            },
        ),
    )
)
def test_an_objective_is_what_its_dictionary_says_or_is_refused_in_one_line(spec: Any) -> None:
    try:
        objective = make_objective(spec)
    except (ValueError, TypeError) as error:
        said_in_one_line(error)
        return
    assert make_objective(json.loads(json.dumps(objective.to_dict()))) == objective
    for name, value in (spec if isinstance(spec, dict) else {}).items():
        assert same(objective.to_dict()[name], value)


BASE = {
    "model_name": "embedded",
    "dataset_path": "embedded",
    "hook_name": "blocks.3.hook_resid_pre",
    "context_size": 16,
    "store_batch_size_prompts": 2,
    "train_batch_size_tokens": 64,
    "training_tokens": 128,
    "verbose": False,
    "sae": {"architecture": "standard", "d_in": 64, "d_sae": 96},
}
AXES = st.sampled_from(
    ["seed", "lr", "objective", "sae.l1_coefficient", "sae", "sae.d_sae", "logger", "context_size", ""]
)


@few
@given(
    st.fixed_dictionaries(
        {
            "base": st.just(BASE)
            | st.dictionaries(st.sampled_from([*BASE, "x"]), VALUES, max_size=2).map(BASE.__or__)
            | VALUES,
            "grid": st.dictionaries(AXES, VALUES, max_size=2)
            | st.lists(st.dictionaries(AXES, VALUES), max_size=2)
            | VALUES,
        },
        optional={
            "name": st.text(max_size=8) | VALUES,
            "evaluation": st.dictionaries(st.sampled_from(["held_out", "max_tokens", "x"]), VALUES, max_size=2)
            | VALUES,
        },
    )
)
def test_a_sweep_file_has_the_points_it_names_or_is_refused_in_one_line(content: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.json"
        path.write_text(json.dumps(content))
        try:
            sweep = read_sweep(path)
        except (ValueError, TypeError) as error:
            said_in_one_line(error)
            return
    names = [point.name for point in sweep.points]
    assert len(set(names)) == len(names) >= 1
    assert all(map(is_folder_name, [sweep.name, *names]))


@few
@given(st.text())
def test_any_text_in_markdown_is_one_line_and_no_cell_of_its_own(text: str) -> None:
    written = plain(text)
    assert len(written.splitlines()) <= 1
    assert not set("<`") & set(written)
    assert "|" not in written.replace("\\|", "")


@few
@given(st.text(max_size=20))
def test_a_folders_name_leads_nowhere_else(name: str) -> None:
    if is_folder_name(name):
        assert Path("out", name).parent == Path("out")
        assert Path("out", name).resolve().parent == Path("out").resolve()
        assert one_line(ValueError(name)) == " ".join(name.split())


def test_the_base_of_these_is_a_config() -> None:
    assert runner_config(sae=StandardTrainingSAEConfig(d_in=16, d_sae=40)).seed == 42
