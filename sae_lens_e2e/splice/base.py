"""What it means to splice an SAE into a language model."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lens_e2e.splice.unembedding import Head


@dataclass(frozen=True)
class CleanPass:
    """The language model without the SAE: what it computed, and what the spliced pass resumes from."""

    activation: Tensor
    """At the SAE's hook, (batch, pos, d_act) or (batch, pos, head, d_head)."""
    downstream: Mapping[str, Tensor]
    final: Float[Tensor, "batch pos d_final"] | None
    """What the head takes; None if the pass stopped at the SAE's hook."""
    resume: Any = None
    """Whatever `Splice.spliced` needs to start again at the hook."""


@dataclass(frozen=True)
class SplicedPass:
    """The language model from the hook on, with the SAE's output in its place."""

    downstream: Mapping[str, Tensor]
    final: Float[Tensor, "batch pos d_final"]


class Splice(ABC):
    """A language model that can be run clean, and again from one hook on with another activation there.

    `downstream_hooks` are captured in both passes. Gradients flow from the spliced pass to the activation put in; the
    caller freezes the model's own weights (see `frozen`).
    """

    def __init__(
        self,
        model: nn.Module,
        hook_name: str,
        hook_head_index: int | None = None,
        downstream_hooks: Sequence[str] = (),
    ):
        self.model = model
        self.hook_name = hook_name
        self.hook_head_index = hook_head_index
        self.downstream_hooks = tuple(downstream_hooks)

    head: Head
    """Turns `final` into a KL divergence."""

    @property
    @abstractmethod
    def n_ctx(self) -> int | None:
        """The longest context the model takes, in tokens; None if it has no limit."""

    @property
    @abstractmethod
    def later_blocks(self) -> list[str]:
        """The hooks at the input of each later block, in order; not the one that is the SAE's own activation."""

    @property
    @abstractmethod
    def last_layer(self) -> str:
        """The hook at the output of the last block."""

    @property
    def later_layers(self) -> list[str]:
        """Every hook between two blocks after the SAE's own, and the output of the last block."""
        return [hook for hook in (*self.later_blocks, self.last_layer) if hook != self.hook_name]

    @abstractmethod
    def clean(self, tokens: Int[Tensor, "batch pos"], stop_at_hook: bool = False) -> CleanPass:
        """Run the model as it is, without gradients; `stop_at_hook` runs no further than the SAE needs."""

    @abstractmethod
    def spliced(self, clean: CleanPass, activation: Tensor) -> SplicedPass:
        """Run on from the hook with `activation` (shaped as `clean.activation`) in place of the model's own."""

    def read(self, activation: Tensor) -> Float[Tensor, "batch pos d_in"]:
        """What the SAE takes of an activation: one head of it, or all heads side by side, as in SAELens."""
        if self.hook_head_index is not None:
            return activation[:, :, self.hook_head_index]
        return activation.flatten(2)

    def write(self, activation: Tensor, x_hat: Float[Tensor, "batch pos d_in"]) -> Tensor:
        """The activation with what `read` took replaced by `x_hat`, in the activation's own dtype and device."""
        x_hat = x_hat.to(activation.device, activation.dtype)
        if self.hook_head_index is None:
            return x_hat.reshape(activation.shape)
        heads = activation.clone()
        heads[:, :, self.hook_head_index] = x_hat
        return heads

    def probe(self, tokens: Int[Tensor, "batch pos"], d_in: int) -> None:
        """Check on a few tokens that the SAE fits its hook, and that what follows does depend on it.

        Raises ValueError naming the field that is wrong.
        """
        with frozen(self.model), torch.enable_grad():
            clean = self.clean(tokens)
            if self.hook_head_index is not None and clean.activation.ndim != 4:
                raise ValueError(
                    f"hook_head_index={self.hook_head_index}: {self.hook_name} has no heads; leave hook_head_index at None"
                )
            if self.hook_head_index is not None and not 0 <= self.hook_head_index < clean.activation.shape[2]:
                raise ValueError(
                    f"hook_head_index={self.hook_head_index}: {self.hook_name} has {clean.activation.shape[2]} heads"
                )
            width = self.read(clean.activation).shape[-1]
            if width != d_in:
                raise ValueError(
                    f"sae.d_in={d_in} does not fit {self.hook_name}, which is {width} wide; set d_in={width}"
                )
            activation = clean.activation.detach().clone().requires_grad_()
            spliced = self.spliced(clean, activation)
        for hook in self.downstream_hooks:
            found = spliced.downstream.get(hook)
            if hook == self.hook_name or found is None or not found.requires_grad:
                raise ValueError(f"downstream_hooks: {hook} is not downstream of hook_name={self.hook_name!r}")
        if not spliced.final.requires_grad:
            raise ValueError(f"hook_name={self.hook_name!r}: the model's output does not depend on it")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode whose weights take no gradients, put back as it was on exit."""
    training = {module: module.training for module in model.modules()}
    wanted_grad = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted_grad:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
        for parameter in wanted_grad:
            parameter.requires_grad_(True)


def unknown_hook(field: str, hook: str, known: Sequence[str]) -> ValueError:
    """The error for a hook that the model does not have, with those that look like it."""
    import difflib

    close = difflib.get_close_matches(hook, known, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(close)}?" if close else f"; it has for instance {', '.join(list(known)[:3])}"
    return ValueError(f"{field}: the model has no hook {hook!r}{hint}")
