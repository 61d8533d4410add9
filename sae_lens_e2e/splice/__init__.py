"""Run a language model clean, and again from the earliest write on with sparse modules in it."""

from sae_lens_e2e.splice.anatomy import device_of
from sae_lens_e2e.splice.check import check_sites
from sae_lens_e2e.splice.divergence import Remembered
from sae_lens_e2e.splice.flops import ModelFlops
from sae_lens_e2e.splice.frozen import frozen
from sae_lens_e2e.splice.model import Clean, Replace, Spliced, SplicedModel
from sae_lens_e2e.splice.positions import NO_LABEL, Positions, Where, excluded
from sae_lens_e2e.splice.regions import Compilation
from sae_lens_e2e.splice.site import Site
from sae_lens_e2e.splice.unembedding import Unembedding

__all__ = [
    "NO_LABEL",
    "Clean",
    "Compilation",
    "ModelFlops",
    "Positions",
    "Remembered",
    "Replace",
    "Site",
    "Spliced",
    "SplicedModel",
    "Unembedding",
    "Where",
    "check_sites",
    "device_of",
    "excluded",
    "frozen",
]
