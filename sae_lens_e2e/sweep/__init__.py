"""Many SAEs from one command: a grid over any settings, trained together where they can be."""

from sae_lens_e2e.sweep.folders import failures
from sae_lens_e2e.sweep.grid import read_sweep
from sae_lens_e2e.sweep.plan import Point, Sweep, Tune
from sae_lens_e2e.sweep.run import run_sweep

__all__ = ["Point", "Sweep", "Tune", "failures", "read_sweep", "run_sweep"]
