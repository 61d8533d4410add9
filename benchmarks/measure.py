"""One measurement of a training step, in a process of its own, since a process never gives its peak memory back.

A model with random weights of a shape that people use, an SAE (or several) as sparse as a trained one, Adam, and a few optimizer steps on
random tokens. Time is the median step after two for warming up; memory the peak above the process with the model loaded, SAE, gradients and
optimizer state included.
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
from dataclasses import asdict, dataclass, replace
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

from sae_lens_e2e import E2EDownstream, E2EMultiRunnerConfig, E2EMultiTrainingRunner, E2ERunnerConfig, E2ETrainingRunner
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
    model: Any,
    shape: Shape,
    objective: str,
    kind: str = "hooked",
    n_saes: int = 1,
    prompts_per_forward: int | None = None,
) -> tuple[Callable[[Tensor], float], SplicedModel]:
    """The same step, by the package, and the model it runs on. Several SAEs are at the blocks up to the shape's own, spread evenly."""
    settings: dict[str, Any] = {
        "objective": objective,
        "model_class_name": KINDS[kind].model_class_name,
        "context_size": shape.n_pos,
        "store_batch_size_prompts": prompts_per_forward or shape.n_prompts,
        "train_batch_size_tokens": shape.n_tokens,
        "lr": LR,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    dataset = Dataset.from_dict({"input_ids": [[0] * shape.n_pos]})
    if n_saes == 1:
        cfg = E2ERunnerConfig(sae=sae_config(shape), hook_name=KINDS[kind].hook_name(shape.hook_layer), **settings)
        trainer = E2ETrainingRunner(cfg, dataset, model, sparse_sae(model, shape, kind)).make_trainer()
        return lambda tokens: float(trainer.step(tokens).loss), trainer.group.model
    layers = {f"sae{i}": shape.model["n_layers"] * (i + 1) // (n_saes + 1) for i in range(n_saes)}
    if n_saes >= shape.model["n_layers"]:
        layers = {f"sae{i}": i for i in range(n_saes)}
    several = E2EMultiRunnerConfig(
        saes={name: sae_config(shape) for name in layers},
        hook_names={name: KINDS[kind].hook_name(layer) for name, layer in layers.items()},
        **settings,
    )
    saes = {name: sparse_sae(model, replace(shape, hook_layer=layer), kind) for name, layer in layers.items()}
    group = E2EMultiTrainingRunner(several, dataset, model, saes).make_group()

    def step(tokens: Tensor) -> float:
        group.step(tokens)
        return float(next(iter(group.outputs.values())).loss)

    return step, group.model


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


@dataclass(frozen=True)
class Case:
    """What is measured."""

    shape: str
    objective: str = "e2e_ds"
    side: str = "ours"
    kind: str = "hooked"
    n_saes: int = 1
    n_pos: int | None = None
    """Tokens of a prompt, if others than the shape's; so are the following."""
    ratio: int | None = None
    hook_layer: int | None = None
    steps: int = 5

    @property
    def of_shape(self) -> Shape:
        """The shape, changed as asked."""
        own = {name: getattr(self, name) for name in ("n_pos", "ratio", "hook_layer")}
        return replace(SHAPES[self.shape], **{name: value for name, value in own.items() if value is not None})


def measure(case: Case) -> dict[str, Any]:
    """Seconds a step and peak GiB, in this process."""
    shape = case.of_shape
    model = KINDS[case.kind].load(shape)
    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randint(0, 50257, (shape.n_prompts, shape.n_pos), generator=generator) for _ in range(case.steps + 2)
    ]
    loaded = resident_gib()
    seconds, losses = [], []
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        memory = stack.enter_context(PeakMemory())
        if case.side == "naive":
            step = naive_step(model, shape, case.objective)
        else:
            step, splice = our_step(model, shape, case.objective, case.kind, case.n_saes)
            stack.enter_context(splice.running())
        for batch in batches:
            start = time.perf_counter()
            losses.append(step(batch))
            seconds.append(time.perf_counter() - start)
    figures = {"seconds": statistics.median(seconds[2:]), "peak_gib": memory.peak - loaded, "first_loss": losses[0]}
    return {**asdict(case), "n_tokens": shape.n_tokens, **figures}


def measured(case: Case) -> dict[str, Any]:
    """The same, in a process of its own. Raises RuntimeError with what went wrong there."""
    command = [sys.executable, __file__, json.dumps(asdict(case))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def best_of_two(cases: list[Case]) -> list[dict[str, Any]]:
    """Each case measured twice, taking turns; the faster of the two, so that a disturbance does not decide."""
    rows = [[measured(case) for case in cases] for _ in range(2)]
    return [min(pair, key=lambda row: row["seconds"]) for pair in zip(*rows, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="settings of a Case, as JSON")
    print(json.dumps(measure(Case(**json.loads(parser.parse_args().case)))))
