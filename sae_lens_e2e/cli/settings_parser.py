"""The parser of `train` and `finetune`."""

import simple_parsing

from sae_lens_e2e.cli.parser import OneLine


class SettingsParser(OneLine, simple_parsing.ArgumentParser):
    """For a command whose flags are the fields of a config."""
