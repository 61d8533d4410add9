"""One measurement of a training step, in a process of its own, since a process never gives its peak memory back.

A model with random weights of a shape that people use, an SAE (or several) as sparse as a trained one, Adam, and a few optimizer steps on
random tokens. Time is the median step after two for warming up; memory the peak above the process with the model loaded, SAE, gradients and
optimizer state included.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from random_models import RANDOM_MODELS
from sae_lens import (
    LoggingConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.load_model import HookedProxyLM
from timing import measured_steps, random_batches
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_e2e import E2EDownstream, E2EMultiRunnerConfig, E2EMultiTrainingRunner, E2ERunnerConfig, E2ETrainingRunner
from sae_lens_e2e.objectives.plugins import make_objective
from sae_lens_e2e.splice import SplicedModel, frozen
from sae_lens_e2e.training.group import Group
from sae_lens_e2e.training.memory import kept_memory, largest_block


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
    hugging_face: str
    """The same model in transformers, one of RANDOM_MODELS."""

    @property
    def d_vocab(self) -> int:
        return self.model.get("d_vocab", 50257)

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
TINY: dict[str, Any] = {
    "n_layers": 3,
    "d_model": 16,
    "n_heads": 4,
    "d_head": 4,
    "d_mlp": 32,
    "n_ctx": 16,
    "d_vocab": 211,
}
SHAPES = {
    # To try things out.
    "tiny": Shape(TINY, 1, 4, 2, 16, 8, "tiny"),
    "tinystories-1m": Shape(TINYSTORIES, 4, 50, 4, 512, 30, "tinystories-1m"),
    "gpt2-small": Shape(GPT2, 6, 60, 1, 256, 70, "gpt2-small"),
    "gpt2-small-long": Shape(GPT2, 6, 60, 1, 1024, 70, "gpt2-small"),
}
# A learning rate at which the SAE stays as sparse as it was: the time of a step does not depend on it otherwise.
L1, LR = 0.02, 1e-7
K = 32


def load_model(shape: Shape) -> HookedTransformer:
    """The language model, weights drawn at random; the same in each process."""
    return HookedTransformer(HookedTransformerConfig(**model_settings(shape)))


def model_settings(shape: Shape) -> dict[str, Any]:
    """A shape as the configs of TransformerLens have it."""
    return {
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "device": "cpu",
        "seed": 0,
        "d_vocab": shape.d_vocab,
    } | shape.model


@dataclass(frozen=True)
class Kind:
    """A kind of language model, and what it calls the residual stream that enters a block."""

    model_class_name: str
    load: Callable[[Shape], Any]
    hook_name: Callable[[Shape], str]


def wrapped(model: Any) -> HookedProxyLM:
    """A model of transformers in SAELens' wrapper."""
    tokenizer: Any = None
    return HookedProxyLM(model, tokenizer)


def load_bridge(shape: Shape) -> Any:
    """TransformerLens' bridge, over its own implementation of the blocks."""
    return TransformerBridge.boot_native(TransformerBridgeConfig(**model_settings(shape)))


def _resid_pre(shape: Shape) -> str:
    return f"blocks.{shape.hook_layer}.hook_resid_pre"


KINDS = {
    "hooked": Kind("HookedTransformer", load_model, _resid_pre),
    "hugging-face": Kind(
        "AutoModelForCausalLM",
        lambda shape: wrapped(RANDOM_MODELS[shape.hugging_face].load()),
        lambda shape: RANDOM_MODELS[shape.hugging_face].hook_name(shape.hook_layer),
    ),
    "bridge": Kind("TransformerBridge", load_bridge, _resid_pre),
}


def sae_config(shape: Shape) -> StandardTrainingSAEConfig:
    d_in = shape.model["d_model"]
    return StandardTrainingSAEConfig(d_in=d_in, d_sae=shape.ratio * d_in, l1_coefficient=L1)


def sparse_sae(model: Any, shape: Shape, kind: str) -> StandardTrainingSAE:
    """An SAE whose encoder bias lets as many features fire as a trained one's, on random tokens; the same in each process."""
    torch.manual_seed(0)
    sae = StandardTrainingSAE(sae_config(shape))
    tokens = torch.randint(0, shape.d_vocab, (1, min(64, shape.n_pos)), generator=torch.Generator().manual_seed(2))
    hook = KINDS[kind].hook_name(shape)
    with torch.no_grad():
        x = SplicedModel(model).clean(tokens, hooks=[hook], final=False).at[hook][0]
        strongest = (x @ sae.W_enc).flatten().topk(shape.l0 * len(x)).values
        sae.b_enc.fill_(-strongest[-1])
    return sae


def topk_sae(d_in: int, ratio: int, device: str = "cpu") -> TopKTrainingSAE:
    """A TopK SAE, which is as sparse as a trained one from the start; the same in each process."""
    torch.manual_seed(0)
    return TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=d_in, d_sae=ratio * d_in, k=K, aux_loss_coefficient=0.0, device=device)
    )


def new_sae(model: Any, shape: Shape, kind: str, architecture: str) -> StandardTrainingSAE | TopKTrainingSAE:
    """The SAE of a case, at its first step."""
    return (
        sparse_sae(model, shape, kind) if architecture == "standard" else topk_sae(shape.model["d_model"], shape.ratio)
    )


Watched = Mapping[nn.Module, Callable[[Tensor], Tensor | None]]


@contextmanager
def watched(watches: Watched) -> Iterator[None]:
    """Call a function with what a module puts out, which is then what it returns, unless None."""

    def hook(watch: Callable[[Tensor], Tensor | None], _module: nn.Module, _args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = watch(first)
        if new is None:
            return output
        new = new.to(first.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handles = [module.register_forward_hook(partial(hook, watch)) for module, watch in watches.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def naive_loss(
    logits_of: Callable[[Tensor], Tensor],
    sae: StandardTrainingSAE | TopKTrainingSAE,
    objective: Any,
    at: nn.Module,
    later: Sequence[nn.Module],
    tokens: Tensor,
) -> Tensor:
    """`local`, `e2e` or `e2e_ds` as its equation reads, in plain PyTorch, of an SAE on what `at` puts out; `later` are compared too."""
    later = later if isinstance(objective, E2EDownstream) else ()
    clean: dict[nn.Module, Tensor] = {}
    spliced: dict[nn.Module, Tensor] = {}

    def keep(store: dict[nn.Module, Tensor], module: nn.Module) -> Callable[[Tensor], None]:
        return lambda activation: store.__setitem__(module, activation)

    with torch.no_grad(), watched({module: keep(clean, module) for module in (at, *later)}):
        logits = logits_of(tokens)
    x = clean[at].float()
    features = sae.encode(x)
    x_hat = sae.decode(features)
    loss = x_hat.new_zeros(())
    if objective.mse_coefficient:
        loss = loss + objective.mse_coefficient * (x_hat - x).square().sum(-1).mean()
    if isinstance(sae, StandardTrainingSAE):
        loss = loss + L1 * (features * sae.W_dec.norm(dim=1)).sum(-1).mean()
    if not objective.compares_logits:
        return loss
    with watched({at: lambda _: x_hat, **{module: keep(spliced, module) for module in later}}):
        new_logits = logits_of(tokens)
    log_p, log_q = logits.float().log_softmax(-1), new_logits.float().log_softmax(-1)
    loss = loss + objective.kl_coefficient * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    if later:
        errors = [nn.functional.mse_loss(spliced[module].float(), clean[module].float()) for module in later]
        loss = loss + objective.downstream_coefficient * torch.stack(errors).mean()
    return loss


def optimizer_step(sae: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    """A training step in plain PyTorch: the loss, its gradient, clipped, Adam."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)

    def step(tokens: Tensor) -> float:
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def naive_step(model: HookedTransformer, shape: Shape, objective_name: str) -> Callable[[Tensor], float]:
    """A training step as the equations read, in plain PyTorch over TransformerLens."""
    sae = sparse_sae(model, shape, "hooked")
    names = [f"blocks.{i}.hook_resid_pre" for i in range(shape.hook_layer, shape.model["n_layers"])]
    at, *later = (model.hook_dict[name] for name in names)
    loss_of = partial(naive_loss, model, sae, make_objective(objective_name), at, later)
    return optimizer_step(sae, loss_of)


def our_settings(objective: str, n_prompts: int, n_pos: int, model_class_name: str, **more: Any) -> dict[str, Any]:
    """What a runner's config has in all that is measured: one micro-batch a step."""
    return {
        "objective": objective,
        "model_class_name": model_class_name,
        "context_size": n_pos,
        "store_batch_size_prompts": n_prompts,
        "train_batch_size_tokens": n_prompts * n_pos,
        "lr": LR,
        "logger": LoggingConfig(log_to_wandb=False),
        **more,
    }


def package_step(
    model: Any, sae: Any, hook_name: str, settings: dict[str, Any]
) -> tuple[Callable[[Tensor], float], Group]:
    """A training step of one SAE by the package, and the group that takes it."""
    dataset = Dataset.from_dict({"input_ids": [[0] * settings["context_size"]]})
    cfg = E2ERunnerConfig(sae=sae.cfg, hook_name=hook_name, **settings)
    trainer = E2ETrainingRunner(cfg, dataset, model, sae).make_trainer()
    return lambda tokens: float(trainer.step(tokens).loss), trainer.group


def our_step(model: Any, case: "Case") -> tuple[Callable[[Tensor], float], Group]:
    """The same step, by the package, and the group that takes it. Several SAEs are at the blocks up to the shape's own, spread evenly."""
    shape, kind, n_saes = case.of_shape, case.kind, case.n_saes
    settings = our_settings(case.objective, shape.n_prompts, shape.n_pos, KINDS[kind].model_class_name)
    settings["store_batch_size_prompts"] = case.prompts_per_forward or shape.n_prompts
    if n_saes == 1:
        return package_step(model, new_sae(model, shape, kind, case.sae), KINDS[kind].hook_name(shape), settings)
    layers = {f"sae{i}": shape.model["n_layers"] * (i + 1) // (n_saes + 1) for i in range(n_saes)}
    if n_saes >= shape.model["n_layers"]:
        layers = {f"sae{i}": i for i in range(n_saes)}
    shapes = {name: replace(shape, hook_layer=layer) for name, layer in layers.items()}
    saes: dict[str, Any] = {name: new_sae(model, of, kind, case.sae) for name, of in shapes.items()}
    several = E2EMultiRunnerConfig(
        saes={name: sae.cfg for name, sae in saes.items()},
        hook_names={name: KINDS[kind].hook_name(of) for name, of in shapes.items()},
        **settings,
    )
    dataset = Dataset.from_dict({"input_ids": [[0] * shape.n_pos]})
    group = E2EMultiTrainingRunner(several, dataset, model, saes).make_group()

    def step(tokens: Tensor) -> float:
        group.step(tokens)
        return float(next(iter(group.outputs.values())).loss)

    return step, group


@contextmanager
def as_in_a_run(group: Group, n_pos: int) -> Iterator[None]:
    """What the package's training loop takes its steps under."""
    with group.model.running(), kept_memory(largest_block([group], group.plan.prompts_per_forward * n_pos)):
        yield


@dataclass(frozen=True)
class Case:
    """What is measured."""

    shape: str
    objective: str = "e2e_ds"
    side: str = "ours"
    kind: str = "hooked"
    sae: str = "standard"
    """Or "topk", of K features a token."""
    n_saes: int = 1
    n_pos: int | None = None
    """Tokens of a prompt, if others than the shape's; so are the following."""
    ratio: int | None = None
    hook_layer: int | None = None
    prompts_per_forward: int | None = None
    """All of a step's, unless it says otherwise."""
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
    with ExitStack() as stack:
        stack.enter_context(frozen(model))

        def make_step() -> Callable[[Tensor], float]:
            if case.side == "naive":
                return naive_step(model, shape, case.objective)
            step, group = our_step(model, case)
            stack.enter_context(as_in_a_run(group, shape.n_pos))
            return step

        found = measured_steps(make_step, random_batches(case.steps, shape.n_prompts, shape.n_pos, shape.d_vocab))
    return {**asdict(case), "n_tokens": shape.n_tokens, **found}


def in_own_process(*command: str) -> dict[str, Any]:
    """The JSON in the last line that a command prints. Raises RuntimeError with what went wrong there."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def measured(case: Case) -> dict[str, Any]:
    """`measure`, in a process of its own. Raises RuntimeError with what went wrong there."""
    return in_own_process(sys.executable, __file__, json.dumps(asdict(case)))


def best_of_two(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Each case measured twice, taking turns; the faster of the two, so that a disturbance does not decide."""
    return faster_of_two([partial(measured, case) for case in cases])


def faster_of_two(measurements: Sequence[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """The same of any measurements."""
    rows = [[measurement() for measurement in measurements] for _ in range(2)]
    return [min(pair, key=lambda row: row["seconds"]) for pair in zip(*rows, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="settings of a Case, as JSON")
    print(json.dumps(measure(Case(**json.loads(parser.parse_args().case)))))
