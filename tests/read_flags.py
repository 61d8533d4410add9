"""Preloaded by what the tests' commands are copies of: simple_parsing reads the help of every flag once a process, which takes it half a second."""

from sae_lens_e2e.cli.train import parse_train

parse_train(["--d_in", "4", "--d_sae", "4"])
