"""Text from outside in Markdown, where it is to be text: names of files and what metadata say may hold anything."""

import re

_ENTITY = re.compile(r"&(?=#?\w+;)")
_ENTITIES = str.maketrans({"<": "&lt;", ">": "&gt;", "`": "&#96;"})
# A link or an image, which would fetch something.
_LINK = re.compile(r"\](?=[(\[])")


def plain(text: str) -> str:
    """Text in one line of a paragraph, a heading or a table's cell, without HTML, links, images or code in it."""
    text = _ENTITY.sub("&amp;", one_line_of(text)).translate(_ENTITIES)
    return _LINK.sub(r"]\\", text).replace("|", "\\|")


def code(text: str) -> str:
    """Text in one line as code, wherever a paragraph or a table's cell may be."""
    return f"`{one_line_of(text).replace('`', chr(39))}`".replace("|", "\\|")


def one_line_of(text: str) -> str:
    """Text without line breaks and what cannot be seen."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())
