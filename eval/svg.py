"""Figures as SVG for a web page: no names of files or dates in it, colours that follow the page's light or dark scheme.

Matplotlib's SVG is a document of its own; inside a page its ids would clash, its metadata name web addresses, and its ink
would be black on black in the dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from .plots import COLOURS, FAINT, GREYS, INK, STYLE, figure_like

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THEME = {
    INK: "ink",
    FAINT: "faint",
    "#FFFFFF": "card",
    STYLE["axes.edgecolor"]: "edge",
    STYLE["grid.color"]: "grid",
    **{colour: f"g{place}" for place, colour in enumerate(GREYS)},
    **{colour: f"c{place}" for place, colour in enumerate(COLOURS)},
}
"""Colours of `plots` and the CSS variables, such as --ink, that stand for them; the colour itself is the fallback."""
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and shown in the page's font
    "svg.hashsalt": "posthoc",  # the same figure has the same ids
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def svg(draw: Callable[[Figure], Any], width: float, height: float, *, name: str, alt: str) -> str:
    """An <svg> element of what `draw` draws on a figure of that size in inches; equal input gives equal text.

    name: letters and digits, put before every id: figures of different names can stand in one page. alt: what it
    shows, for those who do not see it. Raises PosthocError without matplotlib.
    """
    buffer = io.BytesIO()
    with figure_like(width, height, _SETTINGS) as figure:
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    return _element(root, name, {"role": "img", "aria-label": alt, "class": "plot"})


def variable(colour: str) -> str:
    """CSS for a colour of `plots` that follows the page's scheme."""
    known = THEME.get(colour.upper(), THEME.get(colour))
    return colour if known is None else f"var(--{known}, {colour.lower()})"


def _element(node: ElementTree.Element, name: str, more: dict[str, str]) -> str:
    """The element as HTML takes it: without namespaces, metadata and ids that nothing refers to."""
    tag = _local(node.tag)
    if tag in (
        "metadata",
        "style",
    ):  # the page has the one rule of that style, `*` would mean every element of the page
        return ""
    given = {_local(key): value for key, value in node.attrib.items()}
    if tag == "svg":
        given = {"viewBox": given["viewBox"], "style": f"max-width:{float(given['width'].removesuffix('pt')):.0f}pt"}
    if tag == "g":
        given.pop("id", None)
    attributes = {key: _referring(value, key, name) for key, value in given.items()} | more
    written = "".join(f' {key}="{html.escape(value)}"' for key, value in attributes.items())
    inside = html.escape(node.text, quote=False) if node.text and node.text.strip() else ""
    inside += "".join(_element(child, name, {}) for child in node)
    return f"<{tag}{written}>{inside}</{tag}>"


def _referring(value: str, key: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return "#" + f"{name}-" + value.removeprefix("#")
    value = value.replace("url(#", f"url(#{name}-")
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: variable(found[0]), value) if key == "style" else value


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
