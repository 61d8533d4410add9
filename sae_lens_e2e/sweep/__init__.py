"""Many SAEs from one command: a grid over any settings, trained together where they can be."""

from sae_lens_e2e.sweep.grid import Point, Sweep, read_sweep
from sae_lens_e2e.sweep.run import failures, run_sweep
from sae_lens_e2e.sweep.together import fit_together

__all__ = ["Point", "Sweep", "failures", "fit_together", "read_sweep", "run_sweep"]
