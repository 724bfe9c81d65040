"""Sphinx's settings for the site that `make docs` builds."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

from quantkit import __version__

project = "quantkit"
release = __version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "quantkit"
html_copy_source = False
html_show_copyright = False
highlight_language = "none"

_REPOSITORY = "https://github.com/quantkit/quantkit/blob/main/"


def _for_the_site(_: Sphinx, page: str, source: list[str]) -> None:
    """Links that leave docs/ lead to the repository; the sections of index.md are the menu."""
    if page == "index":
        for section in source[0].split("\n## ")[1:]:
            listed = re.findall(r"^- \[[^]]+\]\(([\w-]+)\.md\)", section, re.MULTILINE)
            caption = section.partition("\n")[0]
            source[0] += "\n".join(
                ["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *listed, "```\n"]
            )
    source[0] = source[0].replace("](../", f"]({_REPOSITORY}")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _for_the_site)
