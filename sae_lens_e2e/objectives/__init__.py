"""Training objectives: what an SAE's output is compared with, and with what weight."""

from sae_lens_e2e.objectives.base import Objective, Term
from sae_lens_e2e.objectives.batch import Batch, Part
from sae_lens_e2e.objectives.cross_entropy import CrossEntropy
from sae_lens_e2e.objectives.e2e import E2E
from sae_lens_e2e.objectives.e2e_ds import E2EDownstream
from sae_lens_e2e.objectives.local import Local

SplicedBatch = Batch
"""The name of `Batch` in 0.1."""

__all__ = ["E2E", "Batch", "CrossEntropy", "E2EDownstream", "Local", "Objective", "Part", "SplicedBatch", "Term"]
