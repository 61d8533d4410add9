"""Time and memory of one training step, against the naive computation: two whole passes, all logits, log_softmax twice.

    python benchmarks/step.py [--shape tinystories-1m|gpt2-small|gpt2-small-long|all] [--json FILE]
    python benchmarks/step.py --kinds    # our step on each kind of model of GPT2-small's shape

Each measurement is a process of its own, since a process never gives its peak memory back: a model with random weights of
the shape named, an SAE as sparse as a trained one, Adam, and a few optimizer steps on random tokens. Time is the median step after two for warming up;
memory the peak above the process with the model loaded, SAE, gradients and optimizer state included. The two sides take turns, so that whatever
else the machine is doing disturbs both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

from sae_lens_e2e import E2EDownstream, E2ERunnerConfig, E2ETrainingRunner
from sae_lens_e2e.objectives.plugins import make_objective
from sae_lens_e2e.splice import SplicedModel, frozen


@dataclass(frozen=True)
class Shape:
    """A language model, the SAE in it, and one step's batch."""

    model: dict[str, Any]
    hook_layer: int
    ratio: int
    n_prompts: int
    n_pos: int
    l0: int
    """How many features of a token fire, as in a trained SAE; in a new one it is half of them."""

    @property
    def hook_name(self) -> str:
        return f"blocks.{self.hook_layer}.hook_resid_pre"

    @property
    def n_tokens(self) -> int:
        return self.n_prompts * self.n_pos


TINYSTORIES: dict[str, Any] = {
    "n_layers": 8,
    "d_model": 64,
    "n_heads": 16,
    "d_head": 4,
    "d_mlp": 256,
    "n_ctx": 512,
    "use_local_attn": True,
    "attn_types": ["global", "local"] * 4,
    "window_size": 256,
    "use_attn_scale": False,
}
GPT2: dict[str, Any] = {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072, "n_ctx": 1024}
SHAPES = {
    "tinystories-1m": Shape(TINYSTORIES, 4, 50, 4, 512, 30),
    "gpt2-small": Shape(GPT2, 6, 60, 1, 256, 70),
    "gpt2-small-long": Shape(GPT2, 6, 60, 1, 1024, 70),
}
OBJECTIVES = ("e2e", "e2e_ds")
SIDES = ("naive", "ours")
# A learning rate at which the SAE stays as sparse as it was: the time of a step does not depend on it otherwise.
L1, LR = 0.02, 1e-7


def load_model(shape: Shape) -> HookedTransformer:
    """The language model, weights drawn at random; the same in each process."""
    common = {"d_vocab": 50257, "act_fn": "gelu_new", "normalization_type": "LN", "device": "cpu", "seed": 0}
    return HookedTransformer(HookedTransformerConfig(**common, **shape.model))


@dataclass(frozen=True)
class Kind:
    """A kind of language model, and what it calls the residual stream that enters a block."""

    model_class_name: str
    load: Callable[[Shape], Any]
    hook_name: Callable[[int], str]


def load_hugging_face(shape: Shape) -> HookedProxyLM:
    """GPT2 as transformers has it, in SAELens' wrapper."""
    m = shape.model
    sizes = {"n_layer": m["n_layers"], "n_embd": m["d_model"], "n_head": m["n_heads"], "n_positions": m["n_ctx"]}
    tokenizer: Any = None
    return HookedProxyLM(GPT2LMHeadModel(GPT2Config(**sizes)), tokenizer)


def load_bridge(shape: Shape) -> Any:
    """TransformerLens' bridge, over its own implementation of the blocks."""
    common = {"d_vocab": 50257, "act_fn": "gelu_new", "normalization_type": "LN", "device": "cpu", "seed": 0}
    return TransformerBridge.boot_native(TransformerBridgeConfig(**common, **shape.model))


KINDS = {
    "hooked": Kind("HookedTransformer", load_model, lambda layer: f"blocks.{layer}.hook_resid_pre"),
    "hugging-face": Kind("AutoModelForCausalLM", load_hugging_face, lambda layer: f"transformer.h.{layer - 1}"),
    "bridge": Kind("TransformerBridge", load_bridge, lambda layer: f"blocks.{layer}.hook_resid_pre"),
}


def sae_config(shape: Shape) -> StandardTrainingSAEConfig:
    d_in = shape.model["d_model"]
    return StandardTrainingSAEConfig(d_in=d_in, d_sae=shape.ratio * d_in, l1_coefficient=L1)


def sparse_sae(model: Any, shape: Shape, kind: str) -> StandardTrainingSAE:
    """An SAE whose encoder bias lets as many features fire as a trained one's, on random tokens; the same in each process."""
    torch.manual_seed(0)
    sae = StandardTrainingSAE(sae_config(shape))
    tokens = torch.randint(0, 50257, (1, 64), generator=torch.Generator().manual_seed(2))
    hook = KINDS[kind].hook_name(shape.hook_layer)
    with torch.no_grad():
        x = SplicedModel(model).clean(tokens, hooks=[hook], final=False).at[hook][0]
        strongest = (x @ sae.W_enc).flatten().topk(shape.l0 * len(x)).values
        sae.b_enc.fill_(-strongest[-1])
    return sae


def naive_step(model: HookedTransformer, shape: Shape, objective_name: str) -> Callable[[Tensor], float]:
    """A training step as the equations read, in plain PyTorch over TransformerLens."""
    sae = sparse_sae(model, shape, "hooked")
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    objective: Any = make_objective(objective_name)
    later = [f"blocks.{i}.hook_resid_pre" for i in range(shape.hook_layer + 1, shape.model["n_layers"])]
    hooks = later if isinstance(objective, E2EDownstream) else []

    def keep(store: dict[str, Tensor]) -> Callable[..., None]:
        def hook_fn(activation: Tensor, hook: Any) -> None:
            store[hook.name] = activation

        return hook_fn

    def step(tokens: Tensor) -> float:
        clean: dict[str, Tensor] = {}
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=[(h, keep(clean)) for h in (shape.hook_name, *hooks)])
        features = sae.encode(clean[shape.hook_name])
        x_hat = sae.decode(features)
        spliced: dict[str, Tensor] = {}
        new_logits = model.run_with_hooks(
            tokens,
            fwd_hooks=[(shape.hook_name, lambda _, hook: x_hat), *((h, keep(spliced)) for h in hooks)],  # noqa: ARG005
        )
        log_p, log_q = logits.log_softmax(-1), new_logits.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss = objective.kl_coefficient * kl + L1 * (features * sae.W_dec.norm(dim=1)).sum(-1).mean()
        if isinstance(objective, E2EDownstream):
            errors = [torch.nn.functional.mse_loss(spliced[h], clean[h]) for h in hooks]
            loss = loss + objective.downstream_coefficient * torch.stack(errors).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def our_step(
    model: Any, shape: Shape, objective_name: str, kind: str = "hooked"
) -> tuple[Callable[[Tensor], float], SplicedModel]:
    """The same step, by the package, and the model it runs on."""
    cfg = E2ERunnerConfig(
        sae=sae_config(shape),
        objective=objective_name,
        hook_name=KINDS[kind].hook_name(shape.hook_layer),
        model_class_name=KINDS[kind].model_class_name,
        context_size=shape.n_pos,
        store_batch_size_prompts=shape.n_prompts,
        train_batch_size_tokens=shape.n_tokens,
        lr=LR,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    sae = sparse_sae(model, shape, kind)
    dataset = Dataset.from_dict({"input_ids": [[0] * shape.n_pos]})
    trainer = E2ETrainingRunner(cfg, dataset, model, sae).make_trainer()
    return lambda tokens: float(trainer.step(tokens).loss), trainer.group.model


def resident_gib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**30


class PeakMemory:
    """The most resident memory seen while it is entered, sampled every two milliseconds."""

    def __enter__(self) -> "PeakMemory":
        self.peak, self.running = resident_gib(), True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident_gib())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def measure(shape_name: str, objective: str, side: str, n_steps: int, kind: str = "hooked") -> dict[str, Any]:
    """One side of the comparison, in this process."""
    shape = SHAPES[shape_name]
    model = KINDS[kind].load(shape)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 50257, (shape.n_prompts, shape.n_pos), generator=generator) for _ in range(n_steps + 2)]
    loaded = resident_gib()
    seconds, losses = [], []
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        memory = stack.enter_context(PeakMemory())
        if side == "naive":
            step = naive_step(model, shape, objective)
        else:
            step, splice = our_step(model, shape, objective, kind)
            stack.enter_context(splice.running())
        for batch in batches:
            start = time.perf_counter()
            losses.append(step(batch))
            seconds.append(time.perf_counter() - start)
    return {
        "shape": shape_name,
        "objective": objective,
        "side": side,
        "kind": kind,
        "seconds": statistics.median(seconds[2:]),
        "peak_gib": memory.peak - loaded,
        "first_loss": losses[0],
    }


def in_a_process(shape: str, objective: str, side: str, n_steps: int, kind: str = "hooked") -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", shape, objective, side, kind, "--steps", str(n_steps)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def compare(shape: str, objective: str, n_steps: int) -> list[dict[str, Any]]:
    """Both sides, taking turns twice; the better half of each, so that a disturbance does not decide."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(2):
        for side in SIDES:
            row = in_a_process(shape, objective, side, n_steps)
            if side not in best or row["seconds"] < best[side]["seconds"]:
                best[side] = row
    naive, ours = best["naive"], best["ours"]
    if abs(naive["first_loss"] - ours["first_loss"]) > 1e-4 * abs(naive["first_loss"]):
        raise RuntimeError(f"the two sides compute different losses: {naive['first_loss']}, {ours['first_loss']}")
    return [naive, ours]


def report(naive: dict[str, Any], ours: dict[str, Any]) -> str:
    tokens = SHAPES[ours["shape"]].n_tokens
    return (
        f"| {ours['shape']} | {ours['objective']} | {naive['seconds']:.2f} | {ours['seconds']:.2f} | "
        f"{tokens / naive['seconds']:.0f} | {tokens / ours['seconds']:.0f} | {naive['seconds'] / ours['seconds']:.2f} | "
        f"{naive['peak_gib']:.2f} | {ours['peak_gib']:.2f} | {ours['peak_gib'] / naive['peak_gib']:.0%} |"
    )


def compare_kinds(n_steps: int) -> list[dict[str, Any]]:
    """Our step on each kind of model, taking turns twice; the better half of each."""
    rows = [in_a_process("gpt2-small", "e2e_ds", "ours", n_steps, kind) for _ in range(2) for kind in KINDS]
    best = [min((row for row in rows if row["kind"] == kind), key=lambda row: row["seconds"]) for kind in KINDS]
    print("| kind of model | objective | s a step | tokens/s | GiB above the model |")
    print("| --- | --- | --- | --- | --- |")
    for row in best:
        tokens = SHAPES[row["shape"]].n_tokens
        print(
            f"| {row['kind']} | {row['objective']} | {row['seconds']:.2f} | {tokens / row['seconds']:.0f} | "
            f"{row['peak_gib']:.2f} |"
        )
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process")
    parser.add_argument("--json", type=Path, help="where to write the measurements besides")
    parser.add_argument("--kinds", action="store_true", help="compare the kinds of model instead")
    parser.add_argument("--one", nargs=4, metavar=("SHAPE", "OBJECTIVE", "SIDE", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        shape, objective, side, kind = arguments.one
        print(json.dumps(measure(shape, objective, side, arguments.steps, kind)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if arguments.kinds:
        compare_kinds(arguments.steps)
        return
    print(
        "| shape | objective | naive s | ours s | naive tokens/s | ours tokens/s | faster | naive GiB | ours GiB | memory |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for shape in SHAPES if arguments.shape == "all" else [arguments.shape]:
        for objective in OBJECTIVES:
            pair = compare(shape, objective, arguments.steps)
            rows += pair
            print(report(*pair), flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"shapes": {k: asdict(v) for k, v in SHAPES.items()}, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
