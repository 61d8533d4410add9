"""Many SAEs from one command: a grid over any settings, trained together where they can be."""

from sae_lens_e2e.sweep.folders import failures
from sae_lens_e2e.sweep.grid import Point, Sweep, read_sweep
from sae_lens_e2e.sweep.run import run_sweep

__all__ = ["Point", "Sweep", "failures", "read_sweep", "run_sweep"]
