"""Whether a run can be had on this machine, by itself or beside other ranks: asked before any model is loaded."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from sae_lens_e2e.training import ranks
from sae_lens_e2e.training.checks import check_devices
from sae_lens_e2e.training.same_run import difference_of

_DEVICES = ("device", "llm_device", "act_store_device")
# Of each rank its own, or made by SAELens at random.
_MAY_DIFFER = (*_DEVICES, "device_map", "checkpoint_path", "metadata", "run_name")


def make_ready(cfg: Any, held_out: float | None = None) -> None:
    """Check the devices that a run's config names, and, if there are several ranks, that they can share it.

    Among ranks `cuda` becomes the GPU of each rank's own number, and `checkpoint_path` rank 0's. Raises ValueError, naming the field, for a
    device that this machine does not have or that is another rank's, a batch that cannot be dealt, and ranks with different settings.
    """
    ranks.begin()
    with ranks.together():
        _check_quantised(cfg)
        if ranks.world_size() > 1:
            _check_dealt(cfg)
            _take_own_gpu(cfg)
        check_devices(cfg)
    if ranks.world_size() == 1:
        return
    settings = json.loads(json.dumps({**cfg.to_dict(), "held_out": held_out}, default=str))
    of_ranks = ranks.gathered((settings, _gpus(cfg)))
    with ranks.together():
        _check_same([settings for settings, _ in of_ranks])
        _check_apart([gpus for _, gpus in of_ranks])
    cfg.checkpoint_path = of_ranks[0][0]["checkpoint_path"]


def refuse_ranks(what: str) -> None:
    """Raise ValueError, naming it, if there are several ranks for what is done in one process only."""
    ranks.begin()
    with ranks.together():
        if ranks.world_size() > 1:
            raise ValueError(
                f"{what} runs in one process, and torchrun has started {ranks.world_size()}; start it without"
            )


def _check_dealt(cfg: Any) -> None:
    """A step's forward passes are what is dealt, so that none is another than in one process."""
    n_ranks, prompts, size = ranks.world_size(), cfg.prompts_per_step, cfg.store_batch_size_prompts
    if prompts < n_ranks:
        raise ValueError(
            f"train_batch_size_tokens={cfg.train_batch_size_tokens} is {prompts} prompts a step, fewer than the {n_ranks} ranks; set it to "
            f"{n_ranks * cfg.trained_context_size} or more, or start at most {prompts}"
        )
    passes = prompts // size
    if passes % n_ranks:
        below = passes // n_ranks * n_ranks
        nearest = " or ".join(str(n * size * cfg.trained_context_size) for n in (below, below + n_ranks) if n)
        smaller = f", or store_batch_size_prompts to {prompts // n_ranks}" if prompts % n_ranks == 0 else ""
        raise ValueError(
            f"train_batch_size_tokens={cfg.train_batch_size_tokens} is {passes} forward passes of store_batch_size_prompts={size}, which do "
            f"not divide over {n_ranks} ranks; set it to {nearest}{smaller}"
        )


def _take_own_gpu(cfg: Any) -> None:
    for name in _DEVICES:
        kind = torch.device(getattr(cfg, name)).type
        if kind not in ("cpu", "cuda"):
            raise ValueError(
                f"{name}={getattr(cfg, name)!r}: several ranks train on 'cpu' or 'cuda'; set it to one of these"
            )
        if str(getattr(cfg, name)) == "cuda":
            setattr(cfg, name, f"cuda:{ranks.local_rank()}")
    kwargs = cfg.model_from_pretrained_kwargs or {}
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size()))
    if isinstance(place := kwargs.get("device_map"), str) and beside > 1:
        raise ValueError(
            f"model_from_pretrained_kwargs: device_map={place!r} spreads the model over all devices of the machine, and {beside} ranks share "
            "them; leave it out, give each rank a device_map of its own GPUs, or start one rank a machine"
        )
    if (kwargs.get("n_devices") or 1) > 1 and beside > 1:
        raise ValueError(
            f"model_from_pretrained_kwargs: n_devices={kwargs['n_devices']} takes the first devices of the machine, and {beside} ranks share "
            "them; leave it out, or start one rank a machine"
        )


def _gpus(cfg: Any) -> dict[str, str]:
    """The GPUs that a rank computes on, each with the field that says so."""
    kwargs = cfg.model_from_pretrained_kwargs or {}
    place = kwargs.get("device_map")
    named = {name: getattr(cfg, name) for name in _DEVICES}
    if isinstance(place, Mapping):
        named |= {f"device_map[{part!r}]": f"cuda:{at}" if isinstance(at, int) else at for part, at in place.items()}
    return {f"{platform.node()} {at}": name for name, at in named.items() if str(at).startswith("cuda")}


def _check_same(settings: list[dict[str, Any]]) -> None:
    for number, others in enumerate(settings):
        if (other := difference_of(settings[0], others, _MAY_DIFFER)) is not None:
            raise ValueError(
                f"rank {number} has {other.name}={other.now!r} and rank 0 has {other.name}={other.then!r}; start all ranks with the same settings"
            )


def _check_apart(of_ranks: list[dict[str, str]]) -> None:
    taken: dict[str, int] = {}
    for number, gpus in enumerate(of_ranks):
        for gpu, name in gpus.items():
            if taken.setdefault(gpu, number) != number:
                raise ValueError(
                    f"{name}={gpu.split()[-1]!r} is taken by rank {taken[gpu]} and by rank {number}; set it to 'cuda', of which each rank takes "
                    "the GPU of its own number"
                )


def _check_quantised(cfg: Any) -> None:
    """Weights in 8 or 4 bits are the work of a package that not everybody has, and are asked for in a way that can be recorded."""
    kwargs = cfg.model_from_pretrained_kwargs or {}
    for name in ("load_in_8bit", "load_in_4bit"):
        if kwargs.get(name):
            raise ValueError(
                f"model_from_pretrained_kwargs: {name} is an argument no more; set quantization_config to {{{name!r}: True}}"
            )
    wanted = kwargs.get("quantization_config")
    if wanted is None:
        return
    if not isinstance(wanted, Mapping):
        raise ValueError(
            f"model_from_pretrained_kwargs: quantization_config is a {type(wanted).__name__}; give its settings, such as "
            "{'load_in_8bit': True}, which can be recorded"
        )
    bits = next((name for name in ("load_in_8bit", "load_in_4bit") if wanted.get(name)), None)
    if bits is not None and find_spec("bitsandbytes") is None:
        raise ImportError(
            f"model_from_pretrained_kwargs: {bits} takes bitsandbytes, which is not installed; pip install 'sae-lens-e2e[quantised]'"
        )
    if bits == "load_in_4bit" and not _gpus(cfg):
        # There it packs them, when no gradient is asked for, in a way that has none from then on, and does not say so.
        raise ValueError(
            "model_from_pretrained_kwargs: load_in_4bit on a CPU gives wrong gradients (bitsandbytes); use load_in_8bit, or a GPU"
        )
