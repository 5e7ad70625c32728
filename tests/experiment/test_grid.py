"""The arguments of a sweep: which runs they are, what their names are, and which are refused."""

import pytest

from common.errors import UserError
from experiment.grid import Metric, make_grid, options, parse_metric
from experiment.sweep import check_yardstick

CONFIG = """
from configs.config import *
config = Config(
    model=Model("model"),
    data=Data(("train.jsonl",), {validation}sequence_length=256),
    batch=Batch(global_examples=4),
    optimizer=Optimizer(1e-2, epochs=2),
    run=Run("tiny", seed=5),
)
"""


@pytest.fixture
def config(tmp_path) -> str:
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(validation='("validation.jsonl",), '))
    return str(path)


def test_the_product_of_all_values_with_every_seed(config) -> None:
    values = ("optimizer.learning_rate=1e-4,3e-4,0.001", "data.mix=none", "batch.global_examples=2,4")
    grid = make_grid(config, values, 2, None)
    assert len(grid.runs) == 12 and len(grid.points) == 6
    assert grid.fixed == ["data.mix=none"] and grid.seeds == [0, 1] and grid.out == "runs/sweeps/tiny"
    assert grid.values == {"optimizer.learning_rate": [1e-4, 3e-4, 1e-3], "batch.global_examples": [2, 4]}
    run = grid.runs[3]
    assert run.name == "learning_rate-0.0001_global_examples-4_seed-1"
    assert (run.config.optimizer.learning_rate, run.config.batch.global_examples, run.config.run.seed) == (1e-4, 4, 1)
    assert options(run, grid) == [
        *("data.mix=none", "optimizer.learning_rate=1e-4", "batch.global_examples=4", "run.seed=1"),
        *("run.directory=runs/sweeps/tiny", f"run.name={run.name}"),
    ]
    assert len({run.name for run in grid.runs}) == 12


def test_names_do_not_depend_on_how_a_value_is_written(config) -> None:
    names = [
        make_grid(config, [f"optimizer.learning_rate={values}"], None, "out").runs for values in ("1e-3,1", "0.001,1.0")
    ]
    assert [run.name for run in names[0]] == [run.name for run in names[1]]
    assert names[0][0].name == "learning_rate-0.001_seed-5"  # the config's seed


def test_values_with_commas_are_separated_by_a_bar(config) -> None:
    grid = make_grid(config, ["optimizer.betas=0.9,0.95|0.9,0.99", "data.train=a.jsonl,b.jsonl"], None, "out")
    assert [run.config.optimizer.betas for run in grid.runs] == [(0.9, 0.95), (0.9, 0.99)]
    assert {run.config.data.train for run in grid.runs} == {("a.jsonl", "b.jsonl")}
    grid = make_grid(config, ["data.train=a.jsonl,b.jsonl|c.jsonl"], None, "out")
    assert [run.config.data.train for run in grid.runs] == [("a.jsonl", "b.jsonl"), ("c.jsonl",)]
    names = [run.name for run in grid.runs]
    assert len(set(names)) == 2 and all("/" not in name and "," not in name for name in names)
    assert len(make_grid(config, ["model.path=a,b|"], 2, "out").points) == 1  # a comma in a single value


@pytest.mark.parametrize(
    ("values", "seeds", "sentence"),
    [
        (["optimizer.learning_rate=1e-4"], None, "nothing is swept; give several values"),
        (["optimizer.learning_rate=1e-4,0.0001"], None, "optimizer.learning_rate: the value 0.0001 is given twice"),
        (
            ["optimizer.learning_rate=1e-4,2e-4", "optimizer.learning_rate=1"],
            None,
            "optimizer.learning_rate is given twice",
        ),
        (["optimizer.learning_rate=1e-4,fast"], None, "optimizer.learning_rate must be a number"),
        (["optimizer.learningrate=1e-4,2e-4"], None, "did you mean optimizer.learning_rate"),
        (["run.seed=1,2"], None, "run.seed cannot be swept: use --seeds K"),
        (["run.seed=1"], 2, "run.seed and --seeds are both given"),
        (["data.validation=a|b"], None, "data.validation cannot be swept: all runs must be measured on the same data"),
        ([], 0, "--seeds must be 1 or more, not 0"),
    ],
)
def test_a_mistake_is_one_sentence(config, values, seeds, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        make_grid(config, values, seeds, "out")


def test_a_sweep_needs_validation_data_and_refuses_a_test_file(config, tmp_path) -> None:
    loss = parse_metric("validation/loss")
    check_yardstick(make_grid(config, [], 2, "out"), loss)
    with pytest.raises(UserError, match="the data name artifacts/test_words.jsonl, a test file by its name"):
        check_yardstick(make_grid(config, ["data.validation=artifacts/test_words.jsonl"], 2, "out"), loss)
    check_yardstick(
        make_grid(config, ["data.validation=tests/latest.jsonl"], 2, "out"), loss
    )  # a folder's name says nothing
    (tmp_path / "config.py").write_text(CONFIG.format(validation=""))
    with pytest.raises(UserError, match="config.py has no validation data, by which a sweep chooses"):
        check_yardstick(make_grid(config, [], 2, "out"), loss)
    check_yardstick(make_grid(config, ["data.validation_share=0.1"], 2, "out"), loss)


def test_metrics_and_their_directions(config) -> None:
    assert parse_metric("validation/loss") == Metric("validation/loss", True)
    assert parse_metric("validation/loss/replay") == Metric("validation/loss/replay", True)
    assert parse_metric("f1") == Metric("validation/f1", False)
    assert parse_metric("mine:min") == Metric("validation/mine", True)
    for text, sentence in (
        ("mine", "write mine:max or mine:min"),
        ("test/f1", "a sweep chooses by a curve on data.validation"),
        ("f1:up", "a sweep chooses by a curve"),
    ):
        with pytest.raises(UserError, match=sentence):
            parse_metric(text)
    with pytest.raises(UserError, match="--by validation/f1 is a score of generated answers; set run.eval_generate"):
        check_yardstick(make_grid(config, [], 2, "out"), parse_metric("f1"))
