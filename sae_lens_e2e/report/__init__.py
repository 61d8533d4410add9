"""One page on many SAEs: what they cost, what they keep, and whether the paper found the same. Needs `sae-lens-e2e[figures]`."""

from sae_lens_e2e.report.measure import MEASURES
from sae_lens_e2e.report.report import make_report

__all__ = ["MEASURES", "make_report"]
