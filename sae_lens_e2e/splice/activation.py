"""TransformerLens' GELU in one kernel, where it writes it out as eight."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch.nn.functional as F
from torch import nn
from transformer_lens.utilities.activation_functions import gelu_fast, gelu_new

from sae_lens_e2e.splice.hooked_transformer import is_hooked_transformer

TANH_GELU = (gelu_new, gelu_fast)


@contextmanager
def fused_gelu(model: nn.Module) -> Iterator[None]:
    """Compute the tanh approximation of GELU with PyTorch's kernel, equal but for rounding, until the block is left.

    Models other than a `HookedTransformer` bring their own kernels.
    """
    blocks = model.blocks if is_hooked_transformer(model) else ()
    mlps = [block.mlp for block in blocks if hasattr(block, "mlp")]
    with ExitStack() as stack:
        for mlp in mlps:
            if (plain := getattr(mlp, "act_fn", None)) in TANH_GELU:
                mlp.act_fn = partial(F.gelu, approximate="tanh")
                stack.callback(setattr, mlp, "act_fn", plain)
        yield
