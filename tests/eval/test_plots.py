import json

import pytest

from common.errors import UserError
from eval.plots import plot_runs, read_curve


def test_the_curves_of_a_run_are_read_and_plotted(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match="metrics.jsonl does not exist; give the directory of a run"):
        read_curve(run, "train/loss")
    rows = [{"step": 0, "validation/loss": 3.0}]
    rows += [
        {"step": step, "train/loss": 2.0 / step, "train/grad_norm": 1.0, "train/learning_rate": 0.1}
        for step in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_curve(run, "train/loss") == ([1, 2, 3], [2.0, 1.0, 2.0 / 3])
    assert read_curve(run, "validation/loss") == ([0], [3.0])
    plot_runs([run], tmp_path / "figures" / "curve.png")
    assert (tmp_path / "figures" / "curve.png").stat().st_size > 10_000
