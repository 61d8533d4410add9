"""The objectives that come with the package, registered the way any plugin registers its own."""

from sae_lens_e2e.objectives import E2E, CrossEntropy, E2EDownstream, KLAndMSE, Local
from sae_lens_e2e.objectives.hookspecs import Register, hookimpl


@hookimpl
def register_objectives(register: Register) -> None:
    """Register `local`, `e2e`, `e2e_ds`, `ce` and `kl_mse`."""
    for objective in (Local, E2E, E2EDownstream, CrossEntropy, KLAndMSE):
        register(objective)
