"""What the command line says to whoever sits before it: colours where there is a terminal, and how wide a line may be."""

import os
from typing import TextIO

BOLD, RED, YELLOW = "1", "31", "33"


def has_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and nobody has asked for none (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO) -> str:
    """A text as it is written to a stream: in a colour or bold, where that is shown."""
    return f"\033[{style}m{text}\033[0m" if has_colours(stream) else text
