"""Text from strangers, made inert before a terminal or a model card shows it."""

from __future__ import annotations

import re


def one_line(value: object, limit: int = 0) -> str:
    r"""Write a value on one line, with every character escaped that could act on a terminal.

    Control characters, bidirectional marks, lone surrogates and other unprintable characters become escapes such as
    ``\x1b``.

    Args:
        value: Any value; text from a file or from the Hub.
        limit: Characters to keep; 0 keeps all.

    Returns:
        Printable text without line breaks.
    """
    try:
        text = str(value)
    except (RecursionError, ValueError):  # Lists nested too deep; an integer of too many digits.
        text = f"<{type(value).__name__} that cannot be shown>"
    text = visible(" ".join(text.split()))
    return f"{text[: limit - 3]}..." if 0 < limit < len(text) else text


def visible(line: str) -> str:
    """Escape every unprintable character of a line."""
    if line.isprintable():
        return line
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in line
    )


def markdown(value: object) -> str:
    """Write a value as plain text on one line of Markdown, in a table too: no markup and no HTML of its own acts."""
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#!])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
