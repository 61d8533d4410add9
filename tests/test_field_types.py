"""What a config may hold: the type and the range of every field, SAELens' and ours, of one SAE and of several."""

from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)

from sae_lens_e2e import E2EMultiRunnerConfig
from sae_lens_e2e.devices import check_device
from sae_lens_e2e.splice import Site
from tests.training import multi_config, runner_config

PLACE = Site.of_sae("blocks.1.hook_resid_pre", None)


def refused(make: Any, **settings: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        make(**settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def several(**settings: Any) -> Any:
    saes = {"a": (PLACE, TopKTrainingSAEConfig(d_in=16, d_sae=40, k=4))}
    return multi_config(saes, **settings)


@pytest.mark.parametrize("make", [runner_config, several], ids=["one", "several"])
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("n_checkpoints", -1, "at least 0"),
        ("lr_warm_up_steps", -1, "at least 0"),
        ("lr_decay_steps", -1, "at least 0"),
        ("dead_feature_window", -1, "at least 0"),
        ("feature_sampling_window", 0, "at least 1"),
        ("n_restart_cycles", 0, "at least 1"),
        ("adam_beta1", 1.0, "below 1"),
        ("adam_beta2", -0.1, "not negative"),
        ("dead_feature_threshold", float("nan"), "not negative"),
        ("seed", "-1", "an integer, not a str; write -1, without quotes"),
        ("seed", True, "an integer, not a bool"),
        ("seed", 1.5, "an integer, not a float"),
        ("lr", "1e-3", "a number, not a str; write 0.001, without quotes"),
        ("lr", True, "a number, not a bool"),
        ("training_tokens", "1e6", "write 1000000, without quotes"),
        ("max_grad_norm", None, "a number, not None"),
        ("lr_end", "small", "a number or None, not a str"),
        ("streaming", "no", "True or False, not a str"),
        ("model_name", 3, "a text, not an int"),
        ("model_kwargs", [], "dict"),
        ("seqpos_slice", ["a"], "tuple"),
        ("exclude_special_tokens", "yes", "list"),
        ("logger", {"run_name": "x"}, "a LoggingConfig, not a dict"),
        ("lr_scheduler_name", "linear", "one of constant, cosineannealing"),
        ("device", "gpu0", "is no device; it is cpu, cuda"),
        ("sequence_separator_token", "comma", "one of 'bos', 'eos', 'sep'"),
    ],
)
def test_a_field_that_cannot_be_meant_is_refused_by_name(make: Any, field: str, value: Any, says: str) -> None:
    message = refused(make, **{field: value})
    assert message.startswith(f"{field}={value!r}")
    assert says in message


@pytest.mark.parametrize(
    ("sae", "says"),
    [
        (StandardTrainingSAEConfig(d_in=0, d_sae=40), "d_in=0 must be at least 1"),
        (StandardTrainingSAEConfig(d_in=16, d_sae=0), "d_sae=0 must be at least 1"),
        (TopKTrainingSAEConfig(d_in=16, d_sae=40, k=0), "k=0 must be a finite number above 0"),
        (TopKTrainingSAEConfig(d_in=16, d_sae=40, k=41), "k=41 is more than the SAE has features, d_sae=40"),
        (TopKTrainingSAEConfig(d_in=16, d_sae=40, k="4"), "k='4' must be an integer"),  # pyright: ignore[reportArgumentType]
        (StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient="1e-3"), "l1_coefficient='1e-3' must be a number"),  # pyright: ignore[reportArgumentType]
        (StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_warm_up_steps=-1), "l1_warm_up_steps=-1 must be at least 0"),
        (StandardTrainingSAEConfig(d_in=16, d_sae=40, lp_norm=0.0), "lp_norm=0.0 must be a finite number above 0"),
        (JumpReLUTrainingSAEConfig(d_in=16, d_sae=40, jumprelu_bandwidth=0.0), "jumprelu_bandwidth=0.0"),
        (JumpReLUTrainingSAEConfig(d_in=16, d_sae=40, jumprelu_sparsity_loss_mode="l2"), "one of 'step', 'tanh'"),  # pyright: ignore[reportArgumentType]
    ],
    ids=lambda p: p[:20] if isinstance(p, str) else "",
)
def test_so_are_those_of_an_sae_alone_and_among_others(sae: Any, says: str) -> None:
    assert says in refused(runner_config, sae=sae)
    other = (Site.of_sae("blocks.2.hook_resid_pre", None), StandardTrainingSAEConfig(d_in=16, d_sae=40))
    message = refused(lambda: multi_config({"bad": (PLACE, sae), "good": other}))
    assert says in message
    assert message.startswith("saes['bad'].")


def test_what_is_no_config_is_refused() -> None:
    assert refused(runner_config, sae=3) == "sae=3 must be a TrainingSAEConfig, not an int"
    assert "saes=3 must be a mapping" in refused(E2EMultiRunnerConfig, saes=3, hook_names=PLACE.read)
    assert "saes['a']=3 must" in refused(E2EMultiRunnerConfig, saes={"a": 3, "b": 4}, hook_names=PLACE.read)
    assert refused(runner_config, logger=LoggingConfig(wandb_log_frequency=0)).startswith(
        "logger.wandb_log_frequency=0"
    )


def test_what_stands_for_the_same_is_taken() -> None:
    cfg = runner_config(
        lr=1,
        max_grad_norm=10,
        seed=-1,
        seqpos_slice=[0, 12],
        device=torch.device("cpu"),
        adam_beta1=0,
        dead_feature_threshold=np.float64(0.1),
        lr_scheduler_name="cosineAnnealing",
        sae=BatchTopKTrainingSAEConfig(d_in=16, d_sae=40, k=0.5),
        model_from_pretrained_kwargs={},
    )
    assert (cfg.lr, cfg.seed) == (1, -1)


def test_a_device_that_is_not_there_is_named_before_anything_is_done() -> None:
    check_device("device", "cpu")
    with pytest.raises(ValueError, match=r"device='cuda:77': this machine has no such device; it has cpu") as error:
        check_device("device", "cuda:77")
    assert "\n" not in str(error.value)
    # A config may be made on one machine for another.
    assert runner_config(device="cuda:77").device == "cuda:77"
