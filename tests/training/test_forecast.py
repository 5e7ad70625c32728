"""What the planner expects of a run beside what the run measures, and the plan without a run."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import training.forecast
from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from configs.loading.command_line import read_command_line
from planner.cluster import cpu_cluster
from planner.memory import DeviceMemory
from planner.step_time import Speed
from planner.workload import Load, Workload
from tests.processes import run_python
from tests.tiny import write_chat_file, write_tiny_model
from training.dry_run import changed_keys
from training.forecast import Expectation, Forecast, make_forecast
from training.run_log import RunLog

GIB = 2**30
TERMS = {field.name: 0 for field in dataclasses.fields(DeviceMemory)}
MEMORY = DeviceMemory(**TERMS | {"parameters": GIB, "activations": GIB, "other": 9 * GIB, "headroom": 9 * GIB})


def forecast(process: int = GIB) -> Forecast:
    """2 GiB of tensors in a process of `process` bytes, 100 to 200 tokens/s."""
    workload = Workload(40, [], Load((300, 200), 90, step=6), True)
    speed = Speed((100.0, 200.0), (0.5, 2.0), {"products": 1.0})
    expectation = Expectation(cpu_cluster(1, 1e12, 8 * GIB, 2), workload, MEMORY, speed, process)
    return Forecast(expectation, expectation.line())


def meter(steps: int, tokens: int, seconds: float) -> SimpleNamespace:
    return SimpleNamespace(measured_steps=steps, measured_tokens=tokens, measured_seconds=seconds)


def test_the_expectation_names_the_fullest_step_and_leaves_out_what_no_allocator_reports() -> None:
    line = forecast().words
    assert "peak memory 3.0 GiB" in line and "in step 7 (500 tokens" in line
    assert "100 to 200 tokens/s" in line and "30 min to 2.0 h" in line


def test_a_range_that_rounds_to_one_number_is_one_number() -> None:
    expectation = forecast().expectation
    short = dataclasses.replace(expectation, speed=dataclasses.replace(expectation.speed, hours=(0.001, 0.002)))
    assert "tokens/s, about 1 min for all steps" in short.line()


def test_planned_stands_beside_measured_once_after_twenty_steps(tmp_path, ranks, capsys) -> None:
    planned, log = forecast(), RunLog(tmp_path, ranks, 0, {}, total_steps=40)
    planned.compare(meter(19, 19, 1.0), 4.0, False, log, ranks)
    assert capsys.readouterr().out == "" and not (tmp_path / "plan.json").exists()
    planned.compare(meter(20, 1500, 10.0), 4.0, False, log, ranks)
    planned.compare(meter(30, 9, 1.0), 9.0, False, log, ranks)  # once
    log.close()
    said = capsys.readouterr().out
    assert said == (
        "planned against measured (20 steps): peak memory 3.0 and 4.0 GiB (-25%); 100 to 200 and 150 tokens/s, in the "
        "range\n"
    )
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["measured"] == {"steps": 20, "tokens_per_second": 150.0, "memory_gib": 4.0}
    assert kept["planned"]["memory_bytes"]["peak"] == 3 * GIB
    assert kept["planned"]["tokens_per_second"] == [100.0, 200.0]
    assert kept["planned"]["worst_micro_batch"] == {"step": 7, "tokens": 500}


def test_the_fullest_rank_is_compared(tmp_path, ranks, monkeypatch) -> None:
    monkeypatch.setattr(training.forecast, "gather_objects", lambda value, ranks: [value, 6.0, 1.0])
    log = RunLog(tmp_path, ranks, 0, {}, total_steps=40)
    forecast().compare(meter(20, 1500, 10.0), 4.0, False, log, ranks)
    log.close()
    assert json.loads((tmp_path / "plan.json").read_text())["measured"]["memory_gib"] == 6.0


@pytest.mark.parametrize(("steps", "is_compared"), [(0, False), (1, True)])
def test_a_shorter_run_compares_at_its_last_step(tmp_path, ranks, capsys, steps, is_compared) -> None:
    log = RunLog(tmp_path, ranks, 0, {}, total_steps=2)
    forecast().compare(meter(steps, 50, 1.0), 4.0, True, log, ranks)
    log.close()
    assert (tmp_path / "plan.json").exists() == is_compared
    assert ("50 tokens/s, outside of the range" in capsys.readouterr().out) == is_compared


def test_a_forecast_that_cannot_be_computed_is_a_warning_and_ends_no_run(tmp_path, monkeypatch, ranks, capsys) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("an operator without a fake kernel\nand its stack")

    monkeypatch.setattr(training.forecast, "shape_of_run", fails)
    config = Config(Model("m"), Data(("a",)), Batch(global_examples=8), Optimizer(1e-3), Run("r"))
    failed = make_forecast(config, None, None, 0.0, 1)  # pyright: ignore[reportArgumentType]
    assert [failed.words] == [
        "warning: no plan of memory and time for this run, which goes on without one (RuntimeError: an operator without a "
        "fake kernel)"
    ]
    log = RunLog(tmp_path, ranks, 0, {}, total_steps=40)
    failed.compare(
        meter(20, 1500, 10.0), 4.0, False, log, ranks
    )  # other ranks may have one: it takes part, says nothing
    assert failed.is_compared and capsys.readouterr().out == "" and not (tmp_path / "plan.json").exists()
    (tmp_path / "plan.json").mkdir()  # what is compared but cannot be written is said, too
    forecast().compare(meter(20, 1500, 10.0), 4.0, False, log, ranks)
    log.close()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("planned against measured (20 steps)")
    assert said[1:] == ["warning: plan.json could not be written: Is a directory"]


def test_all_processes_of_a_machine_share_its_processors(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training.forecast, "measured_flops", lambda device, dtype, size: 8e12)
    assert training.forecast.expected_peak(torch.bfloat16, 4) == 8e12
    cluster = training.forecast.own_cluster(8e12, 4, 4)
    assert (cluster.device.kind, cluster.devices, cluster.device.flops) == ("cpu", 4, 2e12)


def test_only_keys_that_differ_from_their_default_are_listed() -> None:
    config = Config(
        Model("m"),
        Data(("a.jsonl",), fields={"messages": "chat"}),
        Batch(global_examples=8),
        Optimizer(1e-3, epochs=2),
        Run("r"),
    )
    assert changed_keys(config) == [
        "config: model.path='m'",
        "config: data.train=('a.jsonl',) data.fields={'messages': 'chat'}",
        "config: batch.global_examples=8",
        "config: optimizer.learning_rate=0.001 optimizer.epochs=2",
        "config: run.name='r'",
    ]


@pytest.mark.slow
def test_a_dry_run_needs_no_weights_and_leaves_no_run(tmp_path) -> None:
    write_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    write_chat_file(tmp_path / "train.jsonl", 20)
    (tmp_path / "config.py").write_text(f"""
from configs.config import *
here = {str(tmp_path)!r}
config = Config(
    Model(here + "/model"), Data((here + "/train.jsonl",), sequence_length=256, cache=None),
    Batch(global_examples=8), Optimizer(1e-4, epochs=2), Run("r", directory=here + "/runs"),
)
""")
    plan = tmp_path / "plan.json"
    done = run_python("train.py", tmp_path / "config.py", "--dry-run", "--json", plan, "optimizer.epochs=3")
    assert done.returncode == 0, done.stderr
    assert "config: batch.global_examples=8\n" in done.stdout and "schedule: 9 steps" in done.stdout
    assert done.stdout.endswith("dry run: no weights were read and nothing was trained\n")
    written = json.loads(plan.read_text())
    assert written["workload"]["total_steps"] == 9 and written["cluster"]["device"]["kind"] == "cpu"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--layers", "2"], "--layers is an option of --check: a run trains all layers"),
        (["--check", "--layers", "0"], "--layers must be 1 or more, not 0"),
        (["--json", "x.json"], "--json is an option of --check and --dry-run"),
        (["--check", "--json", "missing/x.json"], "--json missing/x.json: its directory does not exist"),
        (["--dry-run", "--json", "."], "--json .: name a file that can be written"),
    ],
)
def test_options_without_what_they_belong_to(monkeypatch, arguments, sentence) -> None:

    monkeypatch.setattr("sys.argv", ["train.py", "configs/quickstart.py", *arguments])
    with pytest.raises(UserError, match=sentence):
        read_command_line(None, 1, print)


def test_only_rank_0_needs_the_directory_of_the_json(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("sys.argv", ["train.py", "configs/quickstart.py", "--check", "--json", "missing/x.json"])
    assert read_command_line(None, 2, print).json == "missing/x.json"
