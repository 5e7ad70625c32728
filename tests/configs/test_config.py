"""Config files, overrides and the learning rate. A mistake in a config is a one-line error before a process group starts."""

import math
import re
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from configs.config import KEYS
from configs.load import _ELSEWHERE, ALIASES, check_world, load_config, read_command_line
from tests.processes import run_python
from tests.tiny import write_chat_file, write_tiny_model
from train import learning_rate
from training.description import schedule_warnings

GOOD = """from configs.config import *
config = Config(
    model=Model("m"),
    data=Data(("a.jsonl",)),
    batch=Batch(global_examples=8),
    optimizer=Optimizer(1e-4),
    run=Run("r"),
)
"""


@pytest.fixture
def good(tmp_path) -> Path:
    path = tmp_path / "good.py"
    path.write_text(GOOD)
    return path


def test_an_override_is_converted_to_the_type_of_its_key(good) -> None:
    config = load_config(
        good,
        [
            "optimizer.learning_rate=2e-5",
            "batch.global_examples=none",
            "batch.global_tokens=1e4",
            "data.train=a,b",
            "model.compile=true",
            "optimizer.betas=(0.9, 0.99)",
            "optimizer.epochs=2",
            "run.name=7",
        ],
    )
    assert config.optimizer.learning_rate == 2e-5 and config.optimizer.betas == (0.9, 0.99)
    assert config.batch.global_examples is None and config.batch.global_tokens == 10000
    assert config.data.train == ("a", "b") and config.model.compile is True
    assert config.run.name == "7" and type(config.optimizer.epochs) is int


@pytest.mark.parametrize(
    "override, words",
    [
        ("optimizer.lerning_rate=1", "unknown key optimizer.lerning_rate; did you mean optimizer.learning_rate"),
        ("epochs", "is not an override"),
        ("epochs=1", "unknown key epochs; did you mean optimizer.epochs?"),
        ("optimizer.steps=6", "unknown key optimizer.steps; did you mean optimizer.max_steps?"),
        ("batch=8", "unknown key batch; did you mean batch.global_examples?"),
        ("data.file=a.jsonl", "unknown key data.file; did you mean data.train?"),
        ("warmup=10", "unknown key warmup; did you mean optimizer.warmup_steps?"),
        ("lr=1", "unknown key lr; did you mean optimizer.learning_rate?"),
        ("batch_size=8", "unknown key batch_size; did you mean batch.global_examples?"),
        ("val_set_size=0.1", "did you mean data.validation_share?"),
        ("training.max_seq_length=512", "did you mean data.sequence_length?"),
        ("bf16=True", "did you mean model.compute_dtype=bf16?"),
        ("gradient_accumulation_steps=4", "did you mean batch.global_examples, from which it follows?"),
        ("qqq.zzz=1", "unknown key qqq.zzz; configs/config.py describes all keys"),
        ("batch.micro_batch=largest", "batch.micro_batch must be an integer or auto, not 'largest'"),
        ("data.chat_date=2026-02-30", "data.chat_date must be a date like 2026-01-31, not '2026-02-30'"),
        ("optimizer.epochs=2.5", "optimizer.epochs must be an integer, not '2.5'"),
        ("optimizer.learning_rate=fast", "must be a number"),
        ("model.compile=1", "must be True or False"),
        ("sharding.strategy=zero3", "must be one of full, grad_op"),
        ("optimizer.warmup_ratio=5", "must be between 0 and 1"),
        ("batch.global_tokens=5", "set exactly one of"),
        ("run.name=a/b", "plain directory name"),
        ("data.fields=mesages=dialogue", "data.fields: unknown key 'mesages'; did you mean messages?"),
        ("data.fields=text=", "data.fields: text has no name; write KEY=NAME IN THE FILES"),
        ("run.seed=-1", "run.seed must be at least 0 and below 2^63, not -1"),
    ],
)
def test_a_wrong_override_is_a_one_line_error(good, override, words) -> None:
    with pytest.raises(UserError) as error:
        load_config(good, [override])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (("Run(", "Run(nmae="), "line 7: Run has no key 'nmae'; did you mean name?"),
        (("Optimizer(", "Optimizer(bf16="), "Optimizer has no key 'bf16'; did you mean model.compute_dtype=bf16?"),
        (('Data(("a.jsonl",))', 'Data("a.jsonl")'), "data.train must be a tuple of strings, not 'a.jsonl'; write ('a.jsonl',)"),
        (("1e-4", '"1e-4"'), "optimizer.learning_rate must be a number, not '1e-4'"),
        (("config = ", "konfig = "), "bad.py does not end with `config = Config(...)`"),
        (("Batch(", "Bach("), "bad.py, line 5: NameError: name 'Bach' is not defined"),
        (("import *", "import *\nraise SystemExit(3)"), "line 2: SystemExit: 3"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_a_one_line_error(tmp_path, change, words) -> None:
    path = tmp_path / "bad.py"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_an_error_that_lists_the_others(good) -> None:
    (good.parent / "latin.py").write_bytes("# caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"other.py does not exist; available: \S*good.py$"):
        load_config(good.parent / "other.py")
    with pytest.raises(UserError, match=r"is a directory; available: \S*good.py$"):
        load_config(good.parent)
    good.unlink()
    with pytest.raises(UserError, match="available: none there, see configs/"):
        load_config(good.parent)


def test_without_packing_the_batch_must_divide_by_the_ranks(good) -> None:
    check_world(load_config(good, ["batch.micro_batch=3"]), 3, 3)
    check_world(load_config(good, ["data.packing=False", "batch.micro_batch=2"]), 4, 4)
    with pytest.raises(UserError, match="batch.global_examples=8 is not divisible by 3 ranks x"):
        check_world(load_config(good, ["data.packing=False"]), 3, 3)


def test_an_unusual_schedule_gives_a_warning(good) -> None:
    def warnings(*overrides: str, parameters: float = 8e9, steps: int = 100, warmup: int = 5) -> str:
        return "; ".join(schedule_warnings(load_config(good, list(overrides)), int(parameters), steps, warmup))

    assert warnings("optimizer.learning_rate=2e-5") == ""
    assert "outside 1e-05 to 5e-05" in warnings("optimizer.learning_rate=1e-4")
    assert warnings("optimizer.learning_rate=1e-4", parameters=1e8) == ""
    assert "forgetting" in warnings("optimizer.learning_rate=2e-5", "optimizer.stage=pre-training")
    assert warnings("optimizer.learning_rate=1e-5", "optimizer.stage=pre-training") == ""
    assert "the warm-up of 100 steps covers all 100 steps" in warnings("optimizer.learning_rate=2e-5", warmup=100)
    assert warnings("optimizer.learning_rate=2e-5", warmup=1, steps=1) == ""


def test_learning_rate_against_values_computed_by_hand() -> None:
    rates = [learning_rate(step, 101, 5, 2e-5, 0.1) for step in range(101)]
    assert rates[:5] == pytest.approx([4e-6, 8e-6, 1.2e-5, 1.6e-5, 2e-5])
    assert rates[5] == pytest.approx(2e-5) and rates[100] == pytest.approx(2e-6)
    assert rates[52] == pytest.approx(2e-6 + 1.8e-5 * 0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert max(rates) == pytest.approx(2e-5) and rates[5:] == sorted(rates[5:], reverse=True)
    assert learning_rate(0, 1, 0, 1.0, 0.1) == 1.0


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A config of a tiny model, and the directory of an earlier run."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_tiny_model(folder / "model")
    write_chat_file(folder / "a.jsonl", 3)
    config = GOOD.replace('"m"', repr(str(folder / "model"))).replace("a.jsonl", str(folder / "a.jsonl"))
    (folder / "c.py").write_text(config)
    run = folder / "earlier"
    (run / "export").mkdir(parents=True)
    (run / "config.json").write_text('{"model": {"path": "m"}}')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "override, words",
    [
        ("optimizer.epoch=1", "did you mean optimizer.epochs"),
        ("data.train=nothing.jsonl", "nothing.jsonl does not exist"),
        ("data.sequence_length=5000", "exceeds the 512 positions"),
        (
            "model.path={files}/earlier",
            "is the directory of a run, not of a model; the run's model is {files}/earlier/export",
        ),
    ],
)
def test_train_reports_a_mistake_in_one_line_with_exit_code_2(files, override, words) -> None:
    """In a separate process, before a process group: joining one would hang, because no store listens on its port."""
    overrides = override.format(files=files).split()
    unreachable = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    fresh = override.startswith("optimizer.epoch")  # one mistake in a new interpreter
    result = run_python("train.py", files / "c.py", "data.sequence_length=256", *overrides, fresh=fresh, **unreachable)
    assert result.returncode == 2
    assert words.format(files=files) in result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    assert "tokenise" not in result.stderr  # the mistake is reported before the data are read


def test_what_other_tools_call_a_key_names_one_that_is_there_and_hides_none() -> None:
    real = {re.split("[=,]", key)[0] for key in ALIASES.values()}
    assert real <= KEYS.keys() and not ALIASES.keys() & KEYS.keys()
    assert len(ALIASES) == sum(map(len, map(str.split, _ELSEWHERE.values())))  # none stands twice


def test_the_ranks_must_divide_by_the_shard_size_of_hybrid(good) -> None:
    hybrid = load_config(good, ["sharding.strategy=hybrid", "sharding.shard_size=2"])
    check_world(hybrid, 4, 4)
    with pytest.raises(
        UserError, match="3 ranks cannot be divided into groups of sharding.shard_size=2; set it to a divisor of 3"
    ):
        check_world(hybrid, 3, 3)
    check_world(load_config(good, ["sharding.strategy=hybrid"]), 8, 4)
    with pytest.raises(UserError, match="sharding.shard_size=2 needs sharding.strategy=hybrid"):
        load_config(good, ["sharding.shard_size=2"])


def test_a_command_without_a_config_asks_for_nothing_else(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        read_command_line("", 1, print)
    assert capsys.readouterr().err.endswith("required: config\n")
