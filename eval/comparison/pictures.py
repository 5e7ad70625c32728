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
_STYLE = {
    "svg.fonttype": "path",
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

    def figure(self, dark: bool = False) -> Figure:
        """The figure; the caller closes it."""
        with plt.rc_context({**_STYLE, **(_DARK if dark else {})}):
            return self.draw()

    def png(self, path: Path) -> None:
        """Write the light figure to `path`."""
        figure = self.figure()
        figure.savefig(temporary_path(path), dpi=130, format="png")
        plt.close(figure)
        publish(path)

    def svg(self, dark: bool = False) -> bytes:
        """The figure as an SVG file, with letters as outlines: it needs no font."""
        content = io.BytesIO()
        with plt.rc_context({**_STYLE, **(_DARK if dark else {})}):
            figure = self.draw()
            figure.savefig(
                content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
            )
        plt.close(figure)
        return content.getvalue()
