import json

import numpy as np
import pytest
from matplotlib import pyplot as plt

from common.errors import UserError
from eval.run_picture import draw
from tests.pictures import watch_legends


def rows() -> list[dict]:
    """Curves of a run of 20 steps: held-out loss is lowest at step 10."""
    found: list[dict] = [{"step": 0, "validation/loss": 3.0}]
    for step in range(1, 21):
        found.append({"step": step, "train/loss": 9.0, "train/loss/main": 2.0 / step, "train/learning_rate": 1e-4})
    found += [
        {"step": 10, "validation/loss": 0.5},
        {"step": 20, "validation/loss": 0.6, "train/loss/main": float("nan")},
    ]
    found += [{"step": step, "save/total_seconds": 1.0} for step in (10, 20)]
    return [*found, {"step": 10, "validation/f1": 0.5}, {"step": 20, "forgetting/kl": 0.4, "validation/f1": 0.7}]


def test_a_picture_has_the_panels_of_the_curves_and_plain_ticks(tmp_path, monkeypatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows())))
    monkeypatch.setattr(plt, "close", lambda figure: None)
    legends = watch_legends(monkeypatch)
    draw(tmp_path, tmp_path / "run.png")
    figure = plt.gcf()
    monkeypatch.undo()
    loss = figure.axes[0]
    assert len(figure.axes) == 4 and legends == [1] and (tmp_path / "run.png").stat().st_size > 5_000
    training, held_out, saved = loss.get_lines()
    assert np.array_equal(held_out.get_xdata(), [0, 10, 20]) and np.array_equal(saved.get_xdata(), [10, 20])
    # Of the main source, without the NaN
    assert np.array_equal(training.get_ydata(), [2.0 / step for step in range(1, 21)])
    assert [text.get_text() for text in loss.texts] == ["3", "0.5", "0.6"]  # the first, the lowest and the last value
    ticks = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels() if label.get_text()]
    assert {"0.1", "0.3", "1"} <= set(ticks) and all(tick.replace(".", "").isdigit() for tick in ticks)
    f1 = figure.axes[1]
    assert f1.get_title() == "F1 of held-out answers" and np.array_equal(f1.get_lines()[0].get_ydata(), [0.5, 0.7])
    plt.close(figure)


def test_a_run_without_held_out_loss_and_a_path_that_cannot_be_are_one_sentence(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 1.0}))
    with pytest.raises(UserError, match="no validation/loss"):
        draw(tmp_path, tmp_path / "run.png")
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows())))
    for name, why in (("nowhere/run.png", "No such file"), ("run.abc", "Format 'abc' is not supported")):
        with pytest.raises(UserError, match=f"{name} cannot be written: .*{why}.*; name a file such as"):
            draw(tmp_path, tmp_path / name)
