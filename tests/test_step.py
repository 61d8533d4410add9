"""A step of several groups on one clean pass: what it waits for, and what the device is asked."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sae_lens import StandardTrainingSAEConfig, TopKTrainingSAEConfig
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_e2e.splice import Positions, SplicedModel
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.plan import StepPlan
from sae_lens_e2e.training.step import step
from tests.models import random_model, random_tokens
from tests.test_multi_runner import multi_config
from tests.training import make_runner, runner_config

# Each hands something to the host, which on a GPU waits until all that was asked before is done.
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for a device, but for those on what is on the host anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        # Masks are known on the host; all else would be on the device.
        if name in WAITS and args[0].dtype != torch.bool:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Counter[str]]:
    with HostReads() as reads:
        yield reads.counts


def group_of(splice: SplicedModel, model: Any, **settings: Any) -> Group:
    runner = make_runner(runner_config(store_batch_size_prompts=1, **settings), model)
    runner.splice = splice
    return runner.make_group()


@pytest.mark.parametrize("excluded", [(), (0, 1, 2)], ids=["all", "masked"])
def test_nothing_waits_but_the_check_that_the_loss_is_finite(excluded: tuple[int, ...]) -> None:
    model = random_model()
    splice = SplicedModel(model)
    groups = [
        group_of(splice, model, objective="e2e_ds"),
        group_of(splice, model, objective="e2e", sae=TopKTrainingSAEConfig(d_in=16, d_sae=40, k=5)),
        group_of(splice, model, objective="ce", hook_name="blocks.1.hook_mlp_out"),
        group_of(splice, model, objective="local"),
    ]
    plan = StepPlan(1, Positions(excluded_tokens=excluded))
    with splice.running():
        # The first step also asks, once, whether each architecture's losses add up.
        step(splice, groups, random_tokens(4, 12, 61, seed=1), plan)
        with counting() as reads:
            step(splice, groups, random_tokens(4, 12, 61, seed=2), plan)
    # SAELens' TopK asks besides, in each of its forward passes, whether there are dead features.
    assert reads == Counter({"aten._local_scalar_dense": len(groups) + 4})


def test_a_joint_group_is_checked_once_for_all() -> None:
    from sae_lens_e2e import E2EMultiTrainingRunner
    from tests.test_multi_runner import DATASET

    runner = E2EMultiTrainingRunner(multi_config(), override_dataset=DATASET, override_model=random_model())
    group = runner.make_group()
    with runner.splice.running():
        group.step(random_tokens(4, 12, 61, seed=1))
        with counting() as reads:
            group.step(random_tokens(4, 12, 61, seed=2))
    # Of the three architectures TopK and BatchTopK ask in each of two forward passes whether there are dead features.
    assert reads == Counter({"aten._local_scalar_dense": 1 + 2 * 2})


def test_one_that_fails_does_not_stop_the_others_and_is_told_of() -> None:
    model = random_model()
    splice = SplicedModel(model)
    good = group_of(splice, model)
    bad = group_of(splice, model, sae=StandardTrainingSAEConfig(d_in=16, d_sae=40, l1_coefficient=0.02))
    with torch.no_grad():
        bad.first.sae.W_dec.fill_(float("nan"))
    failed: list[tuple[Group, str]] = []
    before = good.first.sae.W_dec.clone()
    with splice.running():
        stand = step(
            splice,
            [bad, good],
            random_tokens(4, 12, 61),
            good.plan,
            lambda group, error: failed.append((group, type(error).__name__)),
        )
    assert stand == [good]
    assert failed == [(bad, "NonFiniteLossError")]
    assert not torch.equal(good.first.sae.W_dec, before)
    assert bad.first.n_training_samples == 0
