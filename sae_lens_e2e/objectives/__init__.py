"""Training objectives: what an SAE's output is compared with, and with what weight.

Their modules import torch where it is called, so that those that come with the package are listed, with their settings, without it.
"""

from sae_lens_e2e.objectives.base import CE_PRODUCTS, KL_PRODUCTS, Coefficient, Objective, Term
from sae_lens_e2e.objectives.batch import Batch, Part
from sae_lens_e2e.objectives.cross_entropy import CrossEntropy
from sae_lens_e2e.objectives.e2e import E2E
from sae_lens_e2e.objectives.e2e_ds import E2EDownstream
from sae_lens_e2e.objectives.in_passes import InPasses
from sae_lens_e2e.objectives.kl_mse import KLAndMSE
from sae_lens_e2e.objectives.local import Local
from sae_lens_e2e.objectives.schedule import Schedule

SplicedBatch = Batch
"""The name of `Batch` in 0.1."""

__all__ = [
    "CE_PRODUCTS",
    "E2E",
    "KL_PRODUCTS",
    "Batch",
    "Coefficient",
    "CrossEntropy",
    "E2EDownstream",
    "InPasses",
    "KLAndMSE",
    "Local",
    "Objective",
    "Part",
    "Schedule",
    "SplicedBatch",
    "Term",
]
