"""`scripts/measure.py methods` on a tiny model: two methods, the same command again, and a bad share."""

import json

import pytest

from common.errors import UserError
from experiment import commands, methods
from tests.forked_jobs import start_forked
from tests.tiny import write_chat_file, write_tiny_model

pytestmark = pytest.mark.slow
OVERRIDES = ["ewc.documents=8", "run.save_every=0", "run.eval_every=0"]


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """What the command calls, with the scripts in processes that need not import the libraries: (printed, launched)."""
    launched = []

    def start(script, *rest):
        launched.append(script)
        return start_forked(script, *rest)

    def run(**options):
        launched.clear()
        files = {"test": tmp_path / "test.jsonl", "general": tmp_path / "old.jsonl", "out": tmp_path / "out"}
        how = {"low": 1 / 3, "shares": [0.05, 0.25], "strengths": [1, 10, 100], "both": None, "processes": 1}
        how |= {"plan_only": False, "only": None} | options
        return methods.compare_methods(str(tmp_path / "config.py"), OVERRIDES, **files, **how), list(launched)

    monkeypatch.setattr(commands, "start", start)
    return run


def test_trains_evaluates_compares_and_skips_what_is_finished(tmp_path, compare):
    write_tiny_model(tmp_path / "model")
    for name, count in (("train", 8), ("test", 6), ("old", 12)):
        write_chat_file(tmp_path / f"{name}.jsonl", count, seed=count)
    (tmp_path / "config.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(tmp_path / "model")!r}, compute_dtype="fp32"),
    data=Data(({str(tmp_path / "train.jsonl")!r},), sequence_length=256, cache={str(tmp_path / "tokens")!r}),
    batch=Batch(global_examples=4, micro_batch=2),
    optimizer=Optimizer(1e-2, epochs=1),
    run=Run("base"),
)
""")
    out = tmp_path / "out"
    listed = [line.split() for line in compare(plan_only=True)[0].splitlines()]
    names = "plain low-lr replay-5 replay-25 ewc-1 ewc-10 ewc-100 replay-5-ewc-10 replay-5-ewc-100"
    assert [method[0] for method in listed] == names.split()
    assert listed[-1][2:] == ["ewc.strength=100", f"ewc.fisher={out / 'ewc-1' / 'ewc'}"]
    assert listed[1][1] == "optimizer.learning_rate=0.00333333"
    with pytest.raises(UserError, match="share"):  # checked before the first run
        compare(shares=[1.5])
    assert not out.exists()

    # With so large a strength, an effect is visible even on a random model.
    printed, launched = compare(only=["plain", "ewc-1e+06"], strengths=[1e6])
    lines = (out / "comparison.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0] for row in cells] == ["base", "plain", "ewc-1e+06"]
    assert " to " not in cells[1][3] and " to " in cells[2][3]  # the change of the loss from plain training
    assert cells[0][4] and all(" to " in row[column] for row in cells[1:] for column in (4, 5, 6))
    method = ["train.py", "scripts/evaluate.py", "scripts/measure.py"]
    assert launched == ["scripts/evaluate.py", *method, *method]
    results = [json.loads((out / "results" / f"{name}-general.json").read_text()) for name in ("plain", "ewc-1e+06")]
    plain, ewc = (result["kl"]["value"] for result in results)
    assert 0 < ewc < 0.7 * plain  # measured: 0.60
    before = (out / "plain" / "export" / "model.safetensors").stat().st_mtime_ns
    again, launched = compare(only=["plain"], strengths=[1e6])
    assert launched == []
    assert (out / "plain" / "export" / "model.safetensors").stat().st_mtime_ns == before
    assert again == printed
