"""What a training step costs on a CUDA device, with the shapes of models that people use: one table.

    python benchmarks/gpu.py [--shape gemma-2-2b ...] [--prompts 16 --context 1024] [--ratio 16]
    python benchmarks/gpu.py --device cpu --shape tiny     # all of the code, on a model of no size

Three ways of taking the step of a TopK SAE (k 32) in the middle of a language model of transformers, weights random:

- ours: the package's;
- naive: the equations as they read, two whole passes, all logits, `log_softmax` in float32 twice;
- whole KL: as EleutherAI's sparsify goes about it, one more whole pass with all logits and the KL on them as they are, in the model's precision
  and less the clean side's entropy, no later layers compared; for `local` one pass through all blocks and no logits.

The language model is in bfloat16, the SAE in float32. A step is of 16 prompts of 1,024 tokens, or of as many prompts, a power of two, as
fit. How a step is measured is in `timing.py`; memory is what PyTorch's allocator had given out at the most.
"""

import argparse
import gc
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import as_in_a_run, naive_loss, optimizer_step, our_settings, package_step, topk_sae, watched, wrapped
from random_models import RANDOM_MODELS, RandomModel
from timing import measured_steps, random_batches
from torch import Tensor

from sae_lens_e2e.objectives.plugins import make_objective
from sae_lens_e2e.splice import frozen

SHAPES = ("gpt2-small", "pythia-410m", "gemma-2-2b", "llama-3.2-1b")
OBJECTIVES = ("local", "e2e_ds")
WAYS = ("ours", "naive", "whole KL")


@dataclass(frozen=True)
class Case:
    """What is measured; the fields that are not in the table are the same for all rows of it."""

    shape: str
    objective: str
    way: str
    n_pos: int
    ratio: int
    steps: int
    device: str

    @property
    def random_model(self) -> RandomModel:
        return RANDOM_MODELS[self.shape]


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """All logits of a model of transformers."""
    return model(tokens, use_cache=False).logits


def whole_loss(model: Any, sae: Any, objective: Any, at: torch.nn.Module, tokens: Tensor) -> Tensor:
    """The loss with nothing left out of either pass: cross-entropy against all clean probabilities, or the SAE's own error."""
    if not objective.compares_logits:
        seen: list[Tensor] = []
        with torch.no_grad(), watched({at: seen.append}):
            model.base_model(tokens, use_cache=False)
        x = seen[0].float()
        return (sae(x) - x).square().sum(-1).mean()
    with torch.no_grad():
        probabilities = logits_of(model, tokens).softmax(-1)
    with watched({at: lambda activation: sae(activation.float())}):
        log_q = logits_of(model, tokens).log_softmax(-1)
    return -(probabilities * log_q).sum(-1).mean()


def make_step(case: Case, model: Any, n_prompts: int, stack: ExitStack) -> Callable[[Tensor], float]:
    """A step of one of the three ways; `stack` is what it runs under."""
    n_layers = model.config.num_hidden_layers
    names = [case.random_model.hook_name(layer) for layer in range(n_layers // 2, n_layers)]
    sae = topk_sae(model.config.hidden_size, case.ratio, case.device)
    if case.way == "ours":
        settings = our_settings(case.objective, n_prompts, case.n_pos, "AutoModelForCausalLM", device=case.device)
        step, group = package_step(wrapped(model), sae, names[0], settings)
        stack.enter_context(as_in_a_run(group, case.n_pos))
        return step
    at, *later = (model.get_submodule(name) for name in names)
    objective = make_objective(case.objective)
    if case.way == "naive":
        return optimizer_step(sae, partial(naive_loss, partial(logits_of, model), sae, objective, at, later))
    return optimizer_step(sae, partial(whole_loss, model, sae, objective, at))


def measure(case: Case, n_prompts: int) -> dict[str, Any]:
    """The figures of a case with that many prompts."""
    model = case.random_model.load(case.device, torch.bfloat16)
    batches = random_batches(case.steps, n_prompts, case.n_pos, model.config.vocab_size, case.device)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        return measured_steps(lambda: make_step(case, model, n_prompts, stack), batches, case.device)


def largest_that_fits(measure: Callable[[int], dict[str, Any]], n_prompts: int) -> dict[str, Any] | None:
    """What is measured with `n_prompts`, or with the largest power of two below that memory allows; None if it allows not one."""
    while n_prompts:
        try:
            return {"n_prompts": n_prompts, **measure(n_prompts)}
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        # Not in the handler: the error holds on to what the step had allocated.
        give_back()
        n_prompts = 1 << (n_prompts - 1).bit_length() - 1 if n_prompts > 1 else 0
    return None


def _out_of_memory(error: RuntimeError) -> bool:
    said = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def give_back() -> None:
    """Have nobody hold on to memory of what was measured before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def row(case: Case, found: dict[str, Any] | None) -> str:
    """A line of the table."""
    start = f"| {case.shape} | {case.objective} | {case.way} |"
    if found is None:
        return f"{start} does not fit memory | | | | |"
    per_second = found["n_prompts"] * case.n_pos / found["seconds"]
    return (
        f"{start} {found['n_prompts']} x {case.n_pos} | {found['seconds']:.3f} | {per_second:,.0f} | "
        f"{found['peak_in_all_gib']:.2f} | {found['peak_gib']:.2f} |"
    )


def same(ours: dict[str, Any] | None, naive: dict[str, Any] | None) -> bool:
    """Whether two sides began with the same loss, to what bfloat16 leaves of it; those of different batches cannot be told."""
    if ours is None or naive is None or ours["n_prompts"] != naive["n_prompts"]:
        return True
    return abs(ours["first_loss"] - naive["first_loss"]) <= 0.02 * abs(naive["first_loss"])


def device_name(device: str) -> str:
    """The device as its maker calls it."""
    return (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{device}, {torch.get_num_threads()} threads"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--shape", nargs="+", choices=RANDOM_MODELS, default=SHAPES, metavar="SHAPE", help=", ".join(RANDOM_MODELS)
    )
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step, if they fit")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt, if the model takes as many")
    parser.add_argument("--ratio", type=int, default=16, help="features for each dimension of the residual stream")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    arguments = parser.parse_args()
    for name in ("prompts", "context", "ratio", "steps"):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"--{name} {value}: give 1 or more")
    # SAELens says of each run that its model and data are given, not loaded.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("gpu.py needs a CUDA device and there is none; to try it out: --device cpu --shape tiny")
    print(f"torch {torch.__version__}, {device_name(arguments.device)}\n")
    print("| shape | objective | step | prompts x tokens | s a step | tokens/s | peak GiB | GiB above the model |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    different = []
    for shape in arguments.shape:
        n_pos = min(arguments.context, RANDOM_MODELS[shape].config.max_position_embeddings)
        for objective in OBJECTIVES:
            found = {}
            for way in WAYS:
                case = Case(shape, objective, way, n_pos, arguments.ratio, arguments.steps, arguments.device)
                found[way] = largest_that_fits(partial(measure, case), arguments.prompts)
                give_back()
                print(row(case, found[way]), flush=True)
            if not same(found["ours"], found["naive"]):
                different.append(f"{shape} {objective}")
    if different:
        sys.exit(f"ours and the naive step do not compute the same loss: {', '.join(different)}")


if __name__ == "__main__":
    main()
