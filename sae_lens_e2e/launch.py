"""How this process was started."""

import os


def has_ranks() -> bool:
    """Whether torchrun has started it beside others."""
    told = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return told and int(os.environ["WORLD_SIZE"]) > 1
