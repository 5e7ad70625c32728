"""Check the pictures that tests draw."""

from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text


def watch_legends(patch: pytest.MonkeyPatch) -> list[int]:
    """Check every figure that is saved from now on: no legend covers the data, no label is cut off.

    Return a list to which each saved figure appends its number of legends.
    """
    save, counts = Figure.savefig, []

    def saved(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        for axes in figure.axes:
            for text in filter(Text.get_text, (axes.title, axes.xaxis.label, axes.yaxis.label)):
                box, whole = text.get_window_extent(), figure.bbox
                assert min(box.x0, box.y0) >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, text.get_text()
        legends = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()))]
        for legend in legends:
            assert not legend.get_window_extent().count_overlaps([axes.get_window_extent() for axes in figure.axes])
        counts.append(len(legends))

    patch.setattr(Figure, "savefig", saved)
    return counts
