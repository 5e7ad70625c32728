"""What holds for every picture."""

from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text


def watch_legends(patch: pytest.MonkeyPatch) -> list[int]:
    """See to it that no figure that is saved from now on has a legend over its data or a cut label; how many legends each had."""
    save, counts = Figure.savefig, []

    def saved(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        for axes in figure.axes:
            for text in filter(Text.get_text, (axes.title, axes.xaxis.label, axes.yaxis.label)):
                box, whole = text.get_window_extent(), figure.bbox
                assert min(box.x0, box.y0) >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1, text.get_text()
        legends = [*figure.legends, *(found for axes in figure.axes if (found := axes.get_legend()))]
        for legend in legends:
            assert not legend.get_window_extent().count_overlaps([axes.get_window_extent() for axes in figure.axes])
        counts.append(len(legends))

    patch.setattr(Figure, "savefig", saved)
    return counts
