"""Config files, overrides and the learning rate. A mistake in a config is a one-line error before a process group starts."""

import math
import re
from pathlib import Path

import pytest

from common.errors import UserError
from configs.config import KEYS
from configs.load import _ELSEWHERE, ALIASES, check_world, load_config
from tests.processes import ROOT, run_python
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


def test_gradients_in_bf16_are_refused_where_micro_batches_would_be_added_in_it(good) -> None:
    for strategy in ("none", "hybrid"):
        with pytest.raises(UserError, match="sharding.reduce_dtype=bf16 needs sharding.strategy=full or grad_op"):
            load_config(good, ["sharding.reduce_dtype=bf16", f"sharding.strategy={strategy}"])
    for strategy in ("full", "grad_op"):
        assert load_config(good, ["sharding.reduce_dtype=bf16", f"sharding.strategy={strategy}"])


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
        ("optimiser.epochs=1", "did you mean optimizer.epochs"),
        ("epochs", "is not an override"),
        ("epochs=1", "unknown key epochs; did you mean optimizer.epochs?"),
        ("lr=1", "unknown key lr; did you mean optimizer.learning_rate?"),
        ("optimizer.lr=1", "unknown key optimizer.lr; did you mean optimizer.learning_rate?"),
        ("batch_size=8", "unknown key batch_size; did you mean batch.global_examples?"),
        ("model.name=m", "unknown key model.name; did you mean model.path?"),
        ("val_set_size=0.1", "did you mean data.validation_share?"),
        ("num_train_epochs=1", "unknown key num_train_epochs; did you mean optimizer.epochs?"),
        ("training.max_seq_length=512", "did you mean data.sequence_length?"),
        ("bf16=True", "did you mean model.compute_dtype=bf16?"),
        ("gradient_accumulation_steps=4", "did you mean batch.global_examples, from which it follows?"),
        ("weight_decay=0", "did you mean optimizer.weight_decay?"),
        ("seed=1", "did you mean run.seed?"),
        ("qqq.zzz=1", "unknown key qqq.zzz; configs/config.py describes all keys"),
        ("run.directory=", "run.directory must be a text that is not empty"),
        ("batch.micro_batch=largest", "batch.micro_batch must be an integer or auto, not 'largest'"),
        ("data.on_bad=none", "data.on_bad must be one of error, skip, not 'none'"),
        ("model.rope_factor=0", "model.rope_factor must be above 0"),
        ("data.chat_date=2026-02-30", "data.chat_date must be a date like 2026-01-31, not '2026-02-30'"),
        ("run.timeout_minutes=20000", "run.timeout_minutes must be above 0 and at most 10080 (a week), not 20000"),
        ("lora.dropout=0.1", "lora.dropout=0.1 needs lora.rank above 0"),
        ("optimizer.epochs=2.5", "optimizer.epochs must be an integer, not '2.5'"),
        ("optimizer.epochs=0", "optimizer.epochs must be above 0"),
        ("optimizer.learning_rate=fast", "must be a number"),
        ("optimizer.learning_rate=nan", "must be"),
        ("model.compile=1", "must be True or False"),
        ("sharding.strategy=zero3", "must be one of full, grad_op"),
        ("optimizer.betas=0.9", "must be a tuple of 2 numbers"),
        ("optimizer.warmup_ratio=5", "must be between 0 and 1"),
        ("batch.global_tokens=5", "set exactly one of"),
        ("run.export=best", "run.export=best needs data.validation or data.validation_share"),
        ("run.name=a/b", "plain directory name"),
        ("data.train=", "data.train must be a list of at least one file"),
        ("data.fields=mesages=dialogue", "data.fields: unknown key 'mesages'; did you mean messages?"),
        ("data.fields=dialogue=messages", "'dialogue'; write KEY=NAME IN THE FILES: messages=dialogue"),
        ("data.fields=text=", "data.fields: text has no name; write KEY=NAME IN THE FILES"),
        ("run.seed=-1", "run.seed must be at least 0 and below 2^63, not -1"),
        ("ewc.seed=-1", "ewc.seed must be at least 0 and below 2^63, not -1"),
        (f"run.seed={2**63}", "run.seed must be at least 0 and below 2^63"),
        (f"run.seed={'1' * 5000}", "run.seed must be an integer"),
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
        (("Optimizer(", "Optimizer(lr="), "line 6: Optimizer has no key 'lr'; did you mean learning_rate?"),
        (("Optimizer(", "Optimizer(bf16="), "Optimizer has no key 'bf16'; did you mean model.compute_dtype=bf16?"),
        (('Data(("a.jsonl",))', 'Data("a.jsonl")'), "data.train must be a tuple of strings, not 'a.jsonl'; write ('a.jsonl',)"),
        (('("a.jsonl",)', '["a.jsonl"]'), "data.train must be a tuple of strings, not ['a.jsonl']"),
        (("1e-4", '"1e-4"'), "optimizer.learning_rate must be a number, not '1e-4'"),
        (('Model("m")', '"m"'), "bad.py: model must be Model(...), not 'm'"),
        (("Optimizer(1e-4)", "Optimizer()"), "line 6: TypeError: Optimizer.__init__() missing 1 required positional argument: 'learning_rate'"),
        (("config = ", "konfig = "), "bad.py does not end with `config = Config(...)`"),
        (("config = ", "config = = "), "line 2: invalid syntax"),
        (("Batch(", "Bach("), "bad.py, line 5: NameError: name 'Bach' is not defined"),
        (("1e-4", "1 / 0"), "bad.py, line 6: ZeroDivisionError: division by zero"),
        (("import *", "import *\nimport no_such_module"), "line 2: ModuleNotFoundError: No module named 'no_such_module'"),
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


def test_the_best_checkpoint_can_be_chosen_by_a_held_out_part(good) -> None:
    config = load_config(
        good, ["run.export=best", "data.validation_share=0.02", "data.fields=messages=dialogue,role=who"]
    )
    assert config.data.validation_share == 0.02 and config.data.fields == {"messages": "dialogue", "role": "who"}
    config = load_config(good, ["data.validation=a,b", "data.validation=none", "data.validation_share=0.02"])
    assert config.data.validation == ()


def test_without_packing_the_batch_must_divide_by_the_ranks(good) -> None:
    check_world(load_config(good, ["batch.micro_batch=3"]), 3, 3)
    check_world(load_config(good, ["data.packing=False", "batch.micro_batch=2"]), 4, 4)
    with pytest.raises(UserError, match="batch.global_examples=8 is not divisible by 3 ranks x"):
        check_world(load_config(good, ["data.packing=False"]), 3, 3)


def test_the_ranks_must_divide_by_the_shard_size_of_hybrid(good) -> None:
    hybrid = load_config(good, ["sharding.strategy=hybrid", "sharding.shard_size=2"])
    check_world(hybrid, 4, 4)
    with pytest.raises(
        UserError,
        match="3 ranks cannot be divided into groups of sharding.shard_size=2; set it to a divisor of 3",
    ):
        check_world(hybrid, 3, 3)
    check_world(load_config(good, ["sharding.strategy=hybrid"]), 8, 4)
    with pytest.raises(UserError, match="sharding.shard_size=2 needs sharding.strategy=hybrid"):
        load_config(good, ["sharding.shard_size=2"])


def test_the_configs_of_the_project_load_with_their_documented_settings() -> None:
    xbrl = load_config(ROOT / "configs" / "xbrl.py")
    assert (xbrl.optimizer.learning_rate, xbrl.optimizer.warmup_ratio, xbrl.optimizer.min_lr_ratio) == (2e-5, 0.05, 0.1)
    assert (xbrl.optimizer.epochs, xbrl.batch.global_examples, xbrl.sharding.strategy) == (3, 64, "grad_op")
    assert xbrl.model.compute_dtype == "bf16"
    assert load_config(ROOT / "configs" / "quickstart.py").model.path.endswith("SmolLM2-135M-Instruct")


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
        ("data.mix=law:0.1:nothing.jsonl", "nothing.jsonl does not exist"),
        ("ewc.strength=1 ewc.data=nothing.jsonl", "nothing.jsonl does not exist"),
        ("model.path=nowhere", "model.path=nowhere is not a directory"),
        (
            "model.path={files}/earlier",
            "is the directory of a run, not of a model; the run's model is {files}/earlier/export",
        ),
        (
            "model.layer_class=Blok",
            "model.layer_class=Blok: the model has no module of that class; it has LlamaDecoderLayer",
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


@pytest.mark.slow
def test_the_help_of_train_explains_overrides() -> None:
    assert "section.key=value" in run_python("train.py", "--help").stdout


def test_what_other_tools_call_a_key_names_one_that_is_there_and_hides_none() -> None:
    real = {re.split("[=,]", key)[0] for key in ALIASES.values()}
    assert real <= KEYS.keys() and not ALIASES.keys() & KEYS.keys()
    assert len(ALIASES) == sum(map(len, map(str.split, _ELSEWHERE.values())))  # none stands twice
