"""Config files, overrides, `data.mix` and the learning rate. A mistake is one sentence before a process group starts."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from configs.config import KEYS, Batch, Config, Data, Model, Optimizer, Run, Source, as_dict
from configs.load import (
    _ELSEWHERE,
    ALIASES,
    check_world,
    config_of,
    load_config,
    override,
    parse_best_by,
    read_command_line,
)
from tests.processes import run_python
from tests.tiny import write_chat_file, write_tiny_model
from train import learning_rate
from training.description import schedule_warnings

BASE = Config(Model("m"), Data(("a.jsonl",)), Batch(global_examples=8), Optimizer(1e-4), Run("r"))
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


def test_override_is_converted_to_its_keys_type(good) -> None:
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
            "data.chat_template_options=a=False,b=false,c=None,d=d",
        ],
    )
    # In a template, the text "false" would be true.
    assert config.data.chat_template_options == {"a": False, "b": False, "c": None, "d": "d"}
    assert config.optimizer.learning_rate == 2e-5 and config.optimizer.betas == (0.9, 0.99)
    assert config.batch.global_examples is None and config.batch.global_tokens == 10000
    assert config.data.train == ("a", "b") and config.model.compile is True
    assert config.run.name == "7" and type(config.optimizer.epochs) is int
    assert load_config(good) == BASE


# Overrides, separated by spaces -> words of the sentence that refuses them.
REFUSED = {
    "optimizer.lerning_rate=1": "unknown key optimizer.lerning_rate; did you mean optimizer.learning_rate",
    "epochs": "is not an override",
    "epochs=1": "unknown key epochs; did you mean optimizer.epochs?",
    "data.exclude=a.txt": "unknown key data.exclude; it was removed: delete those examples from the files",
    "optimizer.steps=6": "unknown key optimizer.steps; did you mean optimizer.max_steps?",
    "batch=8": "unknown key batch; did you mean batch.global_examples?",
    "data.file=a.jsonl": "unknown key data.file; did you mean data.train?",
    "lr=1": "unknown key lr; did you mean optimizer.learning_rate?",
    "training.max_seq_length=512": "did you mean data.sequence_length?",
    "bf16=True": "did you mean model.compute_dtype=bf16?",
    "gradient_accumulation_steps=4": "; batch.global_examples decides it",
    "lr_scheduler_type=linear": "unknown key lr_scheduler_type; it is edited in train.py (README.md, Edit the loop)",
    "optimizer._component_=torch.optim.SGD": "; it is edited in train.py",
    "train_on_inputs=true": "; loss is on answers and completions alone",
    "device=cuda": "; it follows from the machine",
    "chat_template_path=a.jinja": "; did you mean data.chat_template?",
    "clip_grad_norm=1": "; did you mean optimizer.max_grad_norm?",
    "dataset_config=x": "unknown key dataset_config; configs/config.py describes all keys",
    "eval_on_start=true": "unknown key eval_on_start; configs/config.py describes all keys",
    "optim_bits=8": "unknown key optim_bits; configs/config.py describes all keys",
    "wandb=True": "did you mean run.log_to?",
    "push_to_hub=True": "unknown key push_to_hub; it needs no key: python scripts/export.py runs/NAME --out DIRECTORY --push",
    "use_liger_kernel=True": "unknown key use_liger_kernel; it needs no key: the logits exist only in chunks",
    "gradient_checkpointing=True": "did you mean model.activation_checkpointing=full?",
    "per_device_train_batch_size=4": "did you mean batch.micro_batch?",
    "trust_remote_code=True": "; code from a model directory is never run",
    "qqq.zzz=1": "unknown key qqq.zzz; configs/config.py describes all keys",
    "batch.micro_batch=largest": "batch.micro_batch must be an integer or auto, not 'largest'",
    "data.chat_date=2026-02-30": "data.chat_date must be a date like 2026-01-31, not '2026-02-30'",
    "optimizer.epochs=2.5": "optimizer.epochs must be an integer, not '2.5'",
    "optimizer.learning_rate=fast": "must be a number",
    "model.compile=1": "must be True or False",
    "sharding.strategy=zero3": "must be one of full, grad_op",
    "sharding.shard_size=2": "sharding.shard_size=2 needs sharding.strategy=hybrid",
    "optimizer.warmup_ratio=5": "must be between 0 and 1",
    "batch.global_tokens=5": "set exactly one of",
    "run.name=a/b": "plain directory name",
    "run.seed=-1": "run.seed must be at least 0 and below 2^63, not -1",
    "run.profile=5": "run.profile must be STEP:COUNT, such as 100:3 for steps 100 to 102, not '5'",
    "run.log_to=tensorboard,wanb": "run.log_to must be each of tensorboard, wandb, mlflow at most once",
    "data.fields=mesages=dialogue": "data.fields: unknown key 'mesages'; did you mean messages?",
    "data.fields=text=": "data.fields: text has no name; write KEY=NAME IN THE FILES",
    "data.mix=general": "'general' is not a source; write NAME:SHARE:FILE,FILE",
    "data.mix=general:0.1:org/name:train": "e.g. ORG/NAME:SPLIT=0.05",
    "data.mix=org/name:train=much": "is not a source",
    "data.mix=general:5:a.txt": "data.mix.share must be above 0 and below 1, not 5.0",
    "data.mix=a:0.5:a.txt;b:0.5:b.txt": "shares that add up to less than 1",
    "data.mix=a:0.1:a.txt;a:0.1:b.txt": "the sources need different names",
    "data.mix=main:0.1:a.txt": "but not main, not 'main'",
    "data.mix=a:0.1:a.txt forgetting.anchor_weight=2": "anchor_weight=2.0 needs a source of data.mix with anchor",
    "data.validation=v data.validation_share=0.1": "not both; data.validation=none takes back the files of a config",
    "run.export=best": "run.export=best needs data.validation or data.validation_share",
    "run.stop_after_no_gain=2 run.eval_every=5": "run.stop_after_no_gain=2 needs data.validation",
    "run.eval_generate=4": "run.eval_generate=4 needs data.validation or",
    "run.best_by=f1 data.validation=v": "run.best_by=f1 needs run.eval_generate",
    "run.best_by=forgetting/kl": "run.best_by=forgetting/kl needs run.eval_general=True",
    "run.best_by=validation/loss/x": "needs a source of data.mix with that name and validation files",
    "run.best_by=fi": "run.best_by=fi must be the name of a curve, and NAME:max or NAME:min where",
    "eval.metric=a:b:c": "eval.metric must be MODULE:FUNCTION, or the module of a task, not 'a:b:c'",
    "forgetting.min_gain=0.5": "forgetting.min_gain=0.5 needs forgetting.max_kl or max_drop",
    "forgetting.max_drop=0.1": "forgetting.max_drop=0.1 needs forgetting.keep, whose answers eval.metric scores",
    "forgetting.max_drop=1": "forgetting.max_drop must be above 0 and below 1, not 1",
    "forgetting.max_drop=0.1 forgetting.keep=a.jsonl data.validation=v": "forgetting.max_drop=0.1 needs run.eval_general=True",
    "forgetting.max_drop=0.1 forgetting.keep=a.jsonl data.validation=v run.eval_general=True forgetting.general_text=False": "forgetting.general_text=False needs no forgetting.max_drop",
    "forgetting.min_gain=1": "forgetting.min_gain must be at least 0 and below 1, not 1",
    "forgetting.keep=a.jsonl": "forgetting.keep=a.jsonl needs forgetting.max_kl",
    "forgetting.general_text=False": "forgetting.general_text=False needs forgetting.keep, on which the budget then",
    "forgetting.max_kl=0.2 data.validation=v": "forgetting.max_kl=0.2 needs run.eval_general=True, which shows",
    "forgetting.max_kl=0.2 data.validation=v run.eval_general=True run.best_by=forgetting/kl": "needs a run.best_by that scores the task",
}  # fmt: skip


@pytest.mark.parametrize("overrides", REFUSED)
def test_a_wrong_override_is_a_one_line_error(overrides) -> None:
    with pytest.raises(UserError) as error:
        override(BASE, overrides.split())
    assert REFUSED[overrides] in str(error.value) and "\n" not in str(error.value)


def test_valid_combinations_are_accepted() -> None:
    answers = ("data.validation=v", "run.eval_generate=4")
    config = override(BASE, (*answers, "run.best_by=mine:max", "eval.metric=pkg.scores:mine", "run.log_to=none"))
    assert (config.run.log_to, config.eval.metric) == ((), "pkg.scores:mine")
    override(BASE, ("run.export=best", "run.best_by=forgetting/kl", "run.eval_general=True"))


@pytest.mark.parametrize(
    ("text", "curve", "direction"),
    [
        ("validation/loss", "validation/loss", "min"),
        ("validation/loss/general", "validation/loss/general", "min"),
        ("f1", "validation/f1", "max"),
        ("forgetting/kl", "forgetting/kl", "min"),
        ("errors:min", "validation/errors", "min"),
    ],
)
def test_a_name_has_a_curve_and_a_direction(text, curve, direction) -> None:
    assert parse_best_by(text) == (curve, direction)


def test_a_mix_on_the_command_line() -> None:
    mixes = {
        "general:0.05:a.jsonl,b.txt;law:1e-1:c.jsonl.gz:d.txt": (
            Source("general", ("a.jsonl", "b.txt"), 0.05),
            Source("law", ("c.jsonl.gz",), 0.1, ("d.txt",)),
        ),
        "org/name:train=0.1;o/n@main:one:test=0.2;a/b.jsonl.gz,c.txt=0.05;s3://b/d.csv=1e-1;x/y/**/[a-c]*.csv=0.1": (
            Source("name-train", ("org/name:train",), 0.1),
            Source("n-main-one-test", ("o/n@main:one:test",), 0.2),
            Source("b", ("a/b.jsonl.gz", "c.txt"), 0.05),
            Source("d", ("s3://b/d.csv",), 0.1),
            Source("y", ("x/y/**/[a-c]*.csv",), 0.1),
        ),
        "base:0.1:anchor:a.jsonl:v.txt;o/n:test=2e-1:anchor;anchor=0.1": (
            Source("base", ("a.jsonl",), 0.1, ("v.txt",), anchor=True),
            Source("n-test", ("o/n:test",), 0.2, anchor=True),
            Source("anchor", ("anchor",), 0.1),
        ),
    }
    for text, sources in mixes.items():
        mixed = override(BASE, [f"data.mix={text}"])
        assert mixed.data.mix == sources
        assert override(mixed, ["data.mix=none"]).data.mix == override(mixed, ["data.mix="]).data.mix == ()
    assert override(mixed, ["forgetting.anchor_weight=2"]).forgetting.anchor_weight == 2.0


def test_wrong_mix_in_config_file_gives_one_line() -> None:
    for source, words in [
        (Source("a", "a.txt", 0.1), "data.mix.paths must be a tuple of strings, not 'a.txt'"),
        (Source("a", ("a.txt",), 0.1, row="hooks"), "data.mix.row must be MODULE:FUNCTION, not 'hooks'"),
        (Source("a", ("a.txt",), "5%"), "data.mix.share must be a number, not '5%'"),
        (Source("a", ("a.txt",), 0.1, fields={"txt": "b"}), "`fields` of a: unknown key 'txt'; did you mean text?"),
        ("a.txt", "data.mix must be a tuple of Sources"),
    ]:
        data = dataclasses.replace(BASE.data, mix=(source,))
        with pytest.raises(UserError, match=words):
            override(dataclasses.replace(BASE, data=data), [])


@pytest.mark.parametrize(
    "change, words",
    [
        (("Run(", "Run(nmae="), "line 7: Run has no key 'nmae'; did you mean name?"),
        (("Optimizer(", "Optimizer(push_to_hub="), "Optimizer has no key 'push_to_hub'; it needs no key: python scripts/export"),
        (("Optimizer(", "Optimizer(bf16="), "Optimizer has no key 'bf16'; did you mean model.compute_dtype=bf16?"),
        (('Data(("a.jsonl",))', 'Data("a.jsonl")'), "data.train must be a tuple of strings, not 'a.jsonl'; write ('a.jsonl',)"),
        (("1e-4", '"1e-4"'), "optimizer.learning_rate must be a number or auto, not '1e-4'"),
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


def test_missing_config_error_lists_available_configs(good) -> None:
    (good.parent / "latin.py").write_bytes("# caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"other.py does not exist; available: \S*good.py$"):
        load_config(good.parent / "other.py")
    with pytest.raises(UserError, match=r"is a directory; available: \S*good.py$"):
        load_config(good.parent)
    good.unlink()
    with pytest.raises(UserError, match="available: none there, see configs/"):
        load_config(good.parent)


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        ("batch.micro_batch=3", (3, 3), None),
        ("data.packing=False batch.micro_batch=2", (4, 4), None),
        ("data.packing=False", (3, 3), "batch.global_examples=8 is not divisible by 3 ranks x"),
        ("sharding.strategy=hybrid sharding.shard_size=2", (4, 4), None),
        ("sharding.strategy=hybrid", (8, 4), None),
        (
            "sharding.strategy=hybrid sharding.shard_size=2",
            (3, 3),
            "3 ranks cannot be divided into groups of sharding.shard_size=2; set it to a divisor of 3",
        ),
    ],
)
def test_batch_and_shards_must_divide_by_the_ranks(overrides, ranks, words) -> None:
    config = override(BASE, overrides.split())
    if words is None:
        check_world(config, *ranks)
        return
    with pytest.raises(UserError, match=words):
        check_world(config, *ranks)


def test_an_unusual_schedule_gives_a_warning() -> None:
    def warnings(rate: str, steps: int = 100, warmup: int = 5) -> str:
        config = override(BASE, [f"optimizer.learning_rate={rate}"])
        return "; ".join(schedule_warnings(config, 8_000_000_000, steps, warmup))

    assert warnings("2e-5") == warnings("2e-5", warmup=1, steps=1) == ""
    assert "higher than usual" in warnings("3e-4")
    assert "the warm-up of 100 steps covers all 100 steps" in warnings("2e-5", warmup=100)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("", "set model.path .* and data.train .* model.path=.* data.train="),
        ("model.path=m", r"set data.train \(your files"),
        ("data.train=a.jsonl", r"set model.path \(the directory of a model"),
    ],
)
def test_missing_model_and_data_are_asked_for(overrides, words) -> None:
    with pytest.raises(UserError, match=words):
        load_config("configs/sft.py", overrides.split())
    assert load_config("configs/sft.py", ["model.path=m", "data.train=a.jsonl"]).optimizer.learning_rate == "auto"


def test_learning_rate_against_values_computed_by_hand() -> None:
    rates = [learning_rate(step, 101, 5, 2e-5, 0.1) for step in range(101)]
    assert rates[:5] == pytest.approx([4e-6, 8e-6, 1.2e-5, 1.6e-5, 2e-5])
    assert rates[5] == pytest.approx(2e-5) and rates[100] == pytest.approx(2e-6)
    assert rates[52] == pytest.approx(2e-6 + 1.8e-5 * 0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert max(rates) == pytest.approx(2e-5) and rates[5:] == sorted(rates[5:], reverse=True)
    assert learning_rate(0, 1, 0, 1.0, 0.1) == 1.0


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Write a config of a tiny model and the directory of an earlier run."""
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
        ("data.train=nothing.jsonl", "nothing.jsonl does not exist"),
        ("data.sequence_length=5000", "exceeds the 512 positions"),
        (
            "model.path={files}/earlier",
            "is the directory of a run, not of a model; the run's model is {files}/earlier/export",
        ),
    ],
)
def test_train_reports_mistake_in_one_line(files, override, words) -> None:
    """Run train.py in a process of its own: joining a process group would hang, because no store listens on its port."""
    overrides = override.format(files=files).split()
    unreachable = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    result = run_python("train.py", files / "c.py", "data.sequence_length=256", *overrides, **unreachable)
    assert result.returncode == 2
    assert words.format(files=files) in result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    assert "tokenise" not in result.stderr  # the mistake is reported before the data are read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.lr=1"], "error: unknown key optimizer.lr; did you mean optimizer.learning_rate?"),
        (
            ["--learning_rate", "2e-5"],
            "error: there is no option --learning_rate (--help); settings are section.key=value; did you mean",
        ),
        (["--quick-check=1"], "error: there is no option --quick-check=1 (--help)"),
        (["--quick-check", "optimizer.lr=1"], "error: unknown key optimizer.lr"),
        (None, "error: run.name=a stands where the config file is expected"),
    ],
)
def test_mistake_ends_start_before_torch_import(tmp_path, arguments, message) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = ["configs/quickstart.py", *arguments] if arguments else ["run.name=a", "configs/quickstart.py"]
    command = sorted(command, key=lambda word: word != "--quick-check")  # an option may come before the config
    done = run_python("train.py", *command, fresh=True, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_aliases_name_existing_keys_and_hide_none() -> None:
    real = {key.partition("=")[0] for key in ALIASES.values() if " " not in key}
    assert real <= KEYS.keys() and not ALIASES.keys() & KEYS.keys()
    assert len(ALIASES) == sum(map(len, map(str.split, _ELSEWHERE.values())))  # no name occurs twice


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--learning_rate 2e-5",
            "no option --learning_rate .* section.key=value; did you mean optimizer.learning_rate?",
        ),
        ("--num-train-epochs=3", "no option --num-train-epochs=3 .*; did you mean optimizer.epochs?"),
        ("--optimizer.epochs=3", "no option --optimizer.epochs=3 .*; did you mean optimizer.epochs?"),
        ("--lr_scheduler_type cosine", "no option --lr_scheduler_type .*; it is edited in train.py"),
        ("--bf16", "; did you mean model.compute_dtype=bf16?"),
        ("--layrs 2", "no option --layrs .--help.; settings are section.key=value; configs/config.py describes them"),
    ],
)
def test_an_option_of_another_tool_names_the_setting(monkeypatch, option, message) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/quickstart.py", *option.split()])
    with pytest.raises(UserError, match=message):
        read_command_line("", 1, print)


def test_override_corrects_invalid_value_of_config_file(monkeypatch, tmp_path) -> None:
    path = tmp_path / "own.py"
    lines = "from configs.load import replace", "from configs.quickstart import config"
    path.write_text("\n".join([*lines, "config = replace(config, 'run.name', 'a/b')"]))
    monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
    with pytest.raises(UserError, match="run.name must be a plain directory name, not 'a/b'"):
        read_command_line("", 1, print)
    monkeypatch.setattr(sys, "argv", ["train.py", str(path), "run.name=ab"])
    assert read_command_line("", 1, print)[0].run.name == "ab"


def test_config_of_another_tool_is_refused(tmp_path) -> None:
    (tmp_path / "sft.yaml").write_text("base_model: ORG/NAME\nsequence_len: 2048\n")  # valid Python: annotations
    with pytest.raises(UserError, match="sft.yaml is no config: that is a Python file; docs/runs.md has"):
        load_config(tmp_path / "sft.yaml")


def test_command_without_config_asks_only_for_it(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        read_command_line("", 1, print)
    assert capsys.readouterr().err.endswith("required: config\n")


def test_recorded_config_of_another_version_is_refused(good) -> None:
    config = load_config(good)
    recorded = json.loads(json.dumps(as_dict(config)))
    assert config_of(recorded) == config
    for change in ({"data": recorded["data"] | {"exclude": None}}, {"extra": {}}):
        with pytest.raises(TypeError, match="exclude|its sections are"):
            config_of(recorded | change)


def test_validation_files_replace_the_share_of_a_config() -> None:
    config = override(BASE, ["data.validation_share=0.1"])
    assert override(config, ["data.validation=a.jsonl"]).data.validation_share == 0
    with pytest.raises(UserError, match=r"set data.validation \(files\) or data.validation_share"):
        override(config, ["data.validation=a.jsonl", "data.validation_share=0.1"])
