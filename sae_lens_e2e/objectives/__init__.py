"""Training objectives: what an SAE's output is compared with, and with what weight."""

from sae_lens_e2e.objectives.base import Objective, SplicedBatch, Term
from sae_lens_e2e.objectives.e2e import E2E
from sae_lens_e2e.objectives.e2e_ds import E2EDownstream
from sae_lens_e2e.objectives.local import Local

__all__ = ["E2E", "E2EDownstream", "Local", "Objective", "SplicedBatch", "Term"]
