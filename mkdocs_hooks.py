"""What the site needs beyond Markdown: names for links to files that it lacks, and docstrings without roles."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace ``[text](../path)``, which is right in the repository, by ``path`` in code type."""
    return re.sub(r"\[[^\]]+\]\(\.\./([^)#]+)[^)]*\)", r"`\1`", markdown)


LETTERS = {
    "\\hat m": "m\u0302",
    "\\sqrt{\\hat v}": "\u221av\u0302",
    "\\Delta": "\u0394",
    "\\phi": "\u03c6",
    "\\theta": "\u03b8",
}
"""The few commands of TeX in docstrings, as letters: pages load nothing that could set them."""


def on_page_content(html: str, **_: Any) -> str:
    """Replace roles of docstrings, such as ``:class:`~package.Name```, by the name in code type."""

    def letters(found: re.Match[str]) -> str:
        text = found[1]
        for command, letter in LETTERS.items():
            text = text.replace(command, letter)
        text = re.sub(r"_(\w)", r"<sub>\1</sub>", text)
        return f"<em>{text}</em>"

    html = re.sub(r":math:<code>([^<]*)</code>", letters, html)
    html = re.sub(r":(?:attr|class|data|exc|func|meth|mod):(<code>)~?(?:[\w.]+\.)?([^<]*</code>)", r"\1\2", html)
    return html.replace("::</p>", ":</p>")
