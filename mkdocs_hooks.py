"""What the site needs beyond Markdown: links to files of the repository, which it does not have, become their names."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace ``[text](../path)``, which is right in the repository, by ``path`` in code type."""
    return re.sub(r"\[[^\]]+\]\(\.\./([^)#]+)[^)]*\)", r"`\1`", markdown)
