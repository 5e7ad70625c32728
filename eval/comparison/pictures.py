"""A figure of a comparison: a PNG file, and for the page SVG in light and in dark.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with colour blindness can tell apart, with
a blue that is seen on white and on black; arms also differ in their marker.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from common.durable_files import publish, temporary_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

COLORS = ("#1F87D0", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
MARKERS = "os^Dv<>*P"
MOST = 28  # characters of a name in a figure
_STYLE = {
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name may have a dollar sign
    "svg.hashsalt": "comparison",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_DARK = {
    **{f"{key}.color": "#e6e6e6" for key in ("text", "xtick", "ytick")},
    **{
        "axes.labelcolor": "#e6e6e6",
        "axes.edgecolor": "#9a9a9a",
        "axes.facecolor": "#1d2126",
        "figure.facecolor": "#1d2126",
    },
    **{"savefig.facecolor": "#1d2126", "grid.color": "#555555"},
    **{"legend.facecolor": "#1d2126", "legend.edgecolor": "#555555"},
}


@dataclass(frozen=True)
class Picture:
    """A figure: file name without ending, caption, what is to be seen in words (for readers who see none), and how to draw."""

    name: str
    caption: str
    words: str
    draw: Callable[[], Figure]

    def drawn(self) -> "Drawn":
        """The figure in all of its forms."""
        with plt.rc_context(_STYLE):
            figure = self.draw()
            light = _saved(figure, "svg")
            figure.set_layout_engine("none")  # as it is laid out now: that takes as long as drawing
            png = _saved(figure, "png")
        with plt.rc_context({**_STYLE, **_DARK}):
            dark = _saved(self.draw(), "svg")
        plt.close("all")
        return Drawn(self.name, self.caption, self.words, light, dark, png)


@dataclass(frozen=True)
class Drawn:
    """A drawn figure: files in memory. The letters of the SVG files are outlines, so that they need no font."""

    name: str
    caption: str
    words: str
    light: bytes
    dark: bytes
    png: bytes

    def write(self, path: Path) -> None:
        """Write the PNG file to `path`."""
        temporary_path(path).write_bytes(self.png)
        publish(path)


def shortened(name: str) -> str:
    """A name that fits beside a figure."""
    return name if len(name) <= MOST else f"{name[: MOST - 1]}\u2026"


def _saved(figure: Figure, kind: str) -> bytes:
    content = io.BytesIO()
    no_date = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {}
    figure.savefig(content, format=kind, dpi=130, metadata=no_date)
    return content.getvalue()
