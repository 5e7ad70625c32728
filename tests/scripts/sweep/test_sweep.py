"""A sweep: the runs of its arguments, the table and notes of their results, and refusals."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from scripts.sweep.grid import Trial, make_grid
from scripts.sweep.results import Sweep

CONFIG = """
from configs.config import *
config = Config(
    model=Model("model"),
    data=Data(("train.jsonl",), ("validation.jsonl",), sequence_length=256),
    batch=Batch(global_examples=4, micro_batch="auto"),
    optimizer=Optimizer(1e-2, epochs=2),
    run=Run("tiny", seed=5),
)
"""
LOSS, RATES = "validation/loss", "optimizer.learning_rate=1e-4,3e-4"


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def test_the_product_of_all_values_with_every_seed(config) -> None:
    values = ("optimizer.learning_rate=1e-4,3e-4,0.001", "data.mix=none", "batch.global_examples=2,4")
    grid = make_grid(config, values, 2, None)
    assert len(grid.runs) == 12
    assert grid.fixed == ["data.mix=none"] and grid.seeds == [0, 1] and grid.out == Path("runs/sweeps/tiny")
    rates = {"1e-4": 1e-4, "3e-4": 3e-4, "0.001": 1e-3}
    assert grid.axes == {"batch.global_examples": {"2": 2, "4": 4}, "optimizer.learning_rate": rates}
    run = grid.runs[3]
    assert run.name == "global_examples-2_learning_rate-0.0003_seed-1"
    assert (run.config.optimizer.learning_rate, run.config.batch.global_examples, run.config.run.seed) == (3e-4, 2, 1)
    assert [*run.options] == [
        *("data.mix=none", "batch.global_examples=2", "optimizer.learning_rate=3e-4", "run.seed=1"),
        *("run.directory=runs/sweeps/tiny", f"run.name={run.name}"),
    ]
    assert len({run.name for run in grid.runs}) == 12


def test_equal_values_give_equal_names(config) -> None:
    grids = [make_grid(config, [f"optimizer.learning_rate={text}"], None, "out") for text in ("1e-3,1", "0.001,1.0")]
    names = [[run.name for run in grid.runs] for grid in grids]
    assert names[0] == names[1] and names[0][0] == "learning_rate-0.001_seed-5"  # the config's seed


def test_values_with_commas_are_separated_by_a_bar(config) -> None:
    grid = make_grid(config, ["optimizer.betas=0.9,0.95|0.9,0.99", "data.train=a.jsonl,b.jsonl"], None, "out")
    assert [run.config.optimizer.betas for run in grid.runs] == [(0.9, 0.95), (0.9, 0.99)]
    assert {run.config.data.train for run in grid.runs} == {("a.jsonl", "b.jsonl")}
    grid = make_grid(config, ["data.train=a.jsonl,b.jsonl|c.jsonl"], None, "out")
    assert [run.config.data.train for run in grid.runs] == [("a.jsonl", "b.jsonl"), ("c.jsonl",)]
    names = [run.name for run in grid.runs]
    assert len(set(names)) == 2 and all("/" not in name and "," not in name for name in names)
    assert len(make_grid(config, ["model.path=a,b|"], 2, "out").axes) == 0  # a comma in a single value


@pytest.mark.parametrize(
    ("values", "seeds", "sentence"),
    [
        ("optimizer.learning_rate=1e-4", None, "nothing is swept; give several values"),
        ("optimizer.learning_rate=1e-4,0.0001", None, "optimizer.learning_rate: the value 0.0001 is given twice"),
        ("optimizer.epochs=1,2 optimizer.epochs=3", None, "optimizer.epochs is given twice"),
        ("optimizer.learning_rate=1e-4,fast", None, "optimizer.learning_rate must be a number"),
        ("data.mix optimizer.learning_rate=1e-4,3e-4", None, "'data.mix' is not an override; write section.key=value"),
        ("optimizer.learningrate=1e-4,2e-4", None, "did you mean optimizer.learning_rate"),
        ("run.seed=1,2", None, "run.seed cannot be swept: use --seeds K"),
        ("run.seed=1", 2, "run.seed and --seeds are both given"),
        ("data.validation=a|b", None, "data.validation cannot be swept: all runs must be measured on the same data"),
    ],
)
def test_a_mistake_is_one_sentence(config, values, seeds, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        make_grid(config, values.split(), seeds, "out")


@pytest.mark.parametrize(
    ("values", "by", "sentence"),
    [
        (["data.validation=artifacts/test_words.jsonl"], LOSS, "the data name artifacts/test_words.jsonl, a test file"),
        (["data.mix=a:0.1:test.jsonl"], LOSS, "the data name test.jsonl, a test file"),
        (["data.validation=tests/latest.jsonl"], LOSS, None),  # a folder's name says nothing
        (["data.validation=none"], LOSS, "has no validation data, by which a sweep chooses"),
        (["data.validation=none", "data.validation_share=0.1"], LOSS, None),
        ([], "f1", "--by f1 is a score of answers; set run.eval_generate"),
        ([], "mine", "--by mine must be the name of a curve, and NAME:max or NAME:min"),
        ([], "test/f1:max", "a sweep chooses by a curve on data.validation"),
    ],
)
def test_a_sweep_never_reads_a_test(config, values, by, sentence) -> None:
    grid = make_grid(config, values, 2, "out")
    if sentence is None:
        assert Sweep(grid, by).curve == LOSS
        return
    with pytest.raises(UserError, match=sentence):
        Sweep(grid, by)


def write_run(run: Trial, loss: float, base: float = 6.0, step: int = 8) -> None:
    """Write the files of a finished run that a sweep reads. The best step is 4, the last is 8."""
    directory = Path(run.config.run.directory) / run.name
    (directory / "export").mkdir(parents=True)
    (directory / "export" / "export.json").write_text(json.dumps({"step": step}))
    rows = [{"step": 0, "validation/loss": base}, {"step": 4, "validation/loss": loss - 0.5}]
    rows += [{"step": 8, "train/tokens": 1000, "train/tokens_per_second": 50.0}, {"step": 8, "validation/loss": loss}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def make(tmp_path, config):
    """Return a function (arguments, seeds) -> the grid of a sweep in tmp_path/out."""
    return lambda arguments, seeds=None: make_grid(config, arguments, seeds, str(tmp_path / "out"))


def left(sweep: Sweep) -> list[str]:
    return [training.name for training in sweep.trainings() if not training.is_done]


def sentences(sweep: Sweep) -> list[str]:
    return sweep.notes(sweep.points())


def test_mean_spread_and_order_of_the_points(make) -> None:
    grid = make(["optimizer.learning_rate=1e-4,3e-4,1e-3"], 3)
    losses = [5.0, 5.1, 5.2, 3.9, 4.0, 4.1, 4.05, 4.0, 4.1]
    for run, loss in zip(grid.runs, losses, strict=True):
        write_run(run, loss)
    sweep = Sweep(grid, LOSS)
    sweep.report()
    written = json.loads((sweep.out / "sweep.json").read_text())
    means = [(point["overrides"][0], round(point["mean"], 6), round(point["spread"], 6)) for point in written["points"]]
    assert means == [
        ("optimizer.learning_rate=3e-4", 4.0, 0.1),
        ("optimizer.learning_rate=1e-3", 4.05, 0.05),
        ("optimizer.learning_rate=1e-4", 5.1, 0.1),
    ]
    assert written["best"] == written["points"][0] and written["is_complete"]
    assert [run["directory"] for run in written["best"]["runs"]] == [f"{grid.out}/{run.name}" for run in grid.runs[3:6]]
    lines = (sweep.out / "sweep.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:5]]
    assert cells[0][:4] == ["optimizer.learning_rate", "validation/loss (lower is better)", "spread", "by seed"]
    assert cells[2] == ["3e-4", "4", "0.1", "3.9 4 4.1", "8", "1,000", "best"]
    assert sentences(sweep) == []
    Path(grid.out, grid.runs[0].name, "export", "export.json").unlink()
    assert sentences(Sweep(grid, LOSS)) == ["runs that are not finished: 1; the best point can still change"]


def test_a_run_is_judged_by_its_exported_step(make) -> None:
    grid = make([RATES])
    for run, score, step in zip(grid.runs, (0.8, 0.9), (4, 8), strict=True):
        write_run(run, score, base=0.95, step=step)
    # By the exported step: 0.3 at step 4, not 0.8 at step 8.
    sweep = Sweep(grid, "validation/loss:max")
    assert [point.mean for point in sweep.points()] == pytest.approx([0.9, 0.3])
    assert "no point is better than the base model, whose validation/loss is 0.95" in sentences(sweep)


def test_the_best_point_is_compared_with_its_base(make) -> None:
    grid = make(["model.path=a,b"])
    for run, loss, base in zip(grid.runs, (4.0, 5.0), (3.0, 9.0), strict=True):
        write_run(run, loss, base)
    assert any("whose validation/loss is 3" in line for line in sentences(Sweep(grid, LOSS)))


def test_a_point_with_a_diverged_seed_loses(make) -> None:
    grid = make(["optimizer.learning_rate=1e-4,1e-2"], 2)
    for run, loss in zip(grid.runs, (4.0, 4.2, 3.0, float("nan")), strict=True):
        write_run(run, loss)
    sweep = Sweep(grid, LOSS)
    rates = [point.overrides[0].partition("=")[2] for point in sweep.points()]
    assert rates == ["1e-4", "1e-2"] and "| 1 finished, 1 diverged |" in sweep.report()
    assert f"{grid.runs[3].name} diverged: its validation/loss is nan" in sentences(sweep) and not left(sweep)


def test_a_changed_sweep_is_refused(make, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("a")
    grid = make([RATES])
    for run in grid.runs:
        write_run(run, 4.0)
    Sweep(grid, LOSS).report()
    with pytest.raises(UserError, match="out was begun with optimizer.epochs=2, now it is 3; put it back, or choose"):
        Sweep(make([RATES, "optimizer.epochs=3"]), LOSS)
    with pytest.raises(UserError, match=r"was begun with axes=\['optimizer.learning_rate'\], now it is"):
        Sweep(make(["batch.global_examples=2,4"]), LOSS)
    two = [RATES, "optimizer.epochs=1,2"]
    first = make_grid(grid.config_file, two, None, "two")
    write_run(first.runs[0], 4.0)
    Sweep(first, LOSS).report()
    turned = make_grid(grid.config_file, two[::-1], None, "two")
    assert [run.name for run in turned.runs] == [run.name for run in first.runs]
    assert Sweep(turned, LOSS).out == first.out
    (tmp_path / "train.jsonl").write_text("b")
    with pytest.raises(UserError, match="out was begun with SHA-256 of train.jsonl=.*; put it back, or choose another"):
        Sweep(grid, LOSS)
    (tmp_path / "mixed.jsonl").write_text("a")
    mixed = make_grid(grid.config_file, [RATES, "data.mix=a:0.1:mixed.jsonl"], None, "mixed")
    write_run(mixed.runs[0], 4.0)
    Sweep(mixed, LOSS).report()
    (tmp_path / "mixed.jsonl").write_text("b")
    with pytest.raises(
        UserError, match="mixed was begun with SHA-256 of mixed.jsonl=.*; put it back, or choose another"
    ):
        Sweep(mixed, LOSS)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_sweep_json_is_one_sentence(make, tmp_path, content) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text(content)
    with pytest.raises(UserError, match="sweep.json is damaged; remove it, or choose another --out"):
        Sweep(make([RATES]), LOSS)


def test_a_larger_grid_keeps_finished_runs(make) -> None:
    smaller = make([RATES], 1)
    for run in smaller.runs:
        write_run(run, 4.0)
    assert left(Sweep(make(["optimizer.learning_rate=3e-5,0.0001,3e-4"], 2), LOSS)) == [
        *("learning_rate-3e-05_seed-0", "learning_rate-3e-05_seed-1"),
        *("learning_rate-0.0001_seed-1", "learning_rate-0.0003_seed-1"),
    ]
    words = "has no validation/loss/replay at step 8; its curves are validation/loss: choose"
    with pytest.raises(UserError, match=words):
        Sweep(smaller, "validation/loss/replay").report()
