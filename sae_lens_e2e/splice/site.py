"""Where a sparse module sits in a language model."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self


class Site(NamedTuple):
    """Where one sparse module reads, and where its output goes."""

    read: str
    """The hook whose activation it takes."""
    writes: tuple[str, ...]
    """The hooks its output goes to: the same one for an SAE, another for a transcoder, several for a cross-layer one."""
    head_index: int | None = None
    """The one head that is read and replaced; None for the whole activation, heads side by side."""

    @classmethod
    def of_sae(cls, hook_name: str, head_index: int | None = None) -> Self:
        """The site of a module that reconstructs what it reads."""
        return cls(hook_name, (hook_name,), head_index)

    @classmethod
    def between(cls, hook_name: str, hook_name_out: str | None = None, head_index: int | None = None) -> Self:
        """The site of a module that writes `hook_name_out`: what it reads, for an SAE, which has none."""
        return cls(hook_name, (hook_name_out or hook_name,), head_index)

    @property
    def is_sae(self) -> bool:
        """Whether what is written stands for what was read."""
        return self.writes == (self.read,)

    @property
    def named_hooks(self) -> list[tuple[str, str]]:
        """The hook it reads, and those it writes that are others, each with the name of the field that says so."""
        return [("hook_name", self.read), *(("hook_name_out", hook) for hook in self.writes if not self.is_sae)]

    def take(self, activation: Float[Tensor, "n *d_act"]) -> Float[Tensor, "n d_in"]:
        """What the module takes of an activation: one head of it, or all heads side by side, as in SAELens."""
        return activation[:, self.head_index] if self.head_index is not None else activation.flatten(1)

    def put(self, activation: Float[Tensor, "n *d_act"], out: Float[Tensor, "n d_out"]) -> Float[Tensor, "n *d_act"]:
        """The activation with what `take` took replaced by `out`, in the activation's own dtype and device."""
        out = out.to(activation.device, activation.dtype)
        if self.head_index is None:
            return out.reshape(activation.shape)
        heads = activation.clone()
        heads[:, self.head_index] = out
        return heads
