"""A language model that is looked through and not trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
