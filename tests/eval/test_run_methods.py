"""Which methods are compared, which overrides they have, and what is launched, without training anything."""

import hashlib
import json
import subprocess
from dataclasses import replace

import pytest

from common.errors import UserError
from eval import run_methods as room
from eval.run_methods import Comparison, check_comparison, choose_methods, plan_methods, run_methods

DEFAULTS = {"low": 1 / 3, "shares": [0.05, 0.25], "strengths": [1, 10, 100], "both": [(0.05, 10), (0.05, 100)]}


@pytest.fixture
def comparison(tmp_path):
    for name in ("train", "test", "old"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    return Comparison(
        config="config.py",
        overrides=["run.eval_every=0"],
        base="BASE",
        learning_rate=1e-2,
        train=str(tmp_path / "train.jsonl"),
        test=tmp_path / "test.jsonl",
        general=str(tmp_path / "old.jsonl"),
        out=tmp_path / "out",
    )


@pytest.fixture
def launched(monkeypatch, comparison):
    """The scripts and options that would have been launched. Every launch writes its result, as the real scripts do."""
    launches = []
    sha256 = hashlib.sha256(comparison.test.read_bytes()).hexdigest()

    def launch(processes, script, *options):
        launches.append((script, *map(str, options)))
        if "--json" in options:
            result = {"model": str(options[0]), "data_sha256": sha256, "base": comparison.base}
            options[options.index("--json") + 1].write_text(json.dumps(result))

    monkeypatch.setattr(room, "launch", launch)
    return launches


def test_methods_and_their_overrides(comparison):
    methods = plan_methods(comparison, **DEFAULTS)
    replay, fisher = f"data.mix=replay:0.05:{comparison.general}", f"ewc.fisher={comparison.out}/ewc-1/ewc"
    assert methods == {
        "plain": [],
        "low-lr": ["optimizer.learning_rate=0.00333333"],
        "replay-5": [replay],
        "replay-25": [f"data.mix=replay:0.25:{comparison.general}"],
        "ewc-1": ["ewc.strength=1", f"ewc.data={comparison.general}"],
        "ewc-10": ["ewc.strength=10", fisher],
        "ewc-100": ["ewc.strength=100", fisher],
        "replay-5-ewc-10": [replay, "ewc.strength=10", fisher],
        "replay-5-ewc-100": [replay, "ewc.strength=100", fisher],
    }


def test_without_strengths_a_combined_method_estimates_its_own_fisher_diagonal(comparison):
    methods = plan_methods(comparison, **DEFAULTS | {"strengths": [], "both": [(0.05, 10)]})
    assert methods["replay-5-ewc-10"][1:] == ["ewc.strength=10", f"ewc.data={comparison.general}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.0}, "--low must be above 0, not 0"),
        ({"strengths": [-1]}, "a strength of EWC must be above 0, not -1"),
        ({"both": [(0.05, 0.0)]}, "a strength of EWC must be above 0, not 0"),
    ],
)
def test_numbers_out_of_range_are_refused(comparison, options, message):
    with pytest.raises(UserError, match=message):
        plan_methods(comparison, **DEFAULTS | options)


def test_missing_files_are_refused(comparison, tmp_path):
    check_comparison(comparison)
    for change, message in (
        ({"general": str(tmp_path / "no.jsonl")}, "no.jsonl does not exist"),
        ({"test": tmp_path}, "is a directory; give the file"),
    ):
        with pytest.raises(UserError, match=message):
            check_comparison(replace(comparison, **change))
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        run_methods(replace(comparison, out=tmp_path / "test.jsonl" / "out"), {}, [])
    assert not comparison.out.exists()


def test_only_chooses_methods_whose_fisher_diagonal_exists_or_will_exist(comparison):
    methods = plan_methods(comparison, **DEFAULTS)
    assert choose_methods(comparison, methods, None) == list(methods)
    assert choose_methods(comparison, methods, ["ewc-10", "ewc-1", "plain"]) == ["plain", "ewc-1", "ewc-10"]
    with pytest.raises(UserError, match="--only lora: the methods are plain, low-lr"):
        choose_methods(comparison, methods, ["plain", "lora"])
    with pytest.raises(UserError, match="ewc-10 takes the Fisher diagonal of ewc-1, which has not run"):
        choose_methods(comparison, methods, ["ewc-10"])
    (comparison.out / "ewc-1" / "ewc").mkdir(parents=True)
    (comparison.out / "ewc-1" / "ewc" / "settings.json").write_text("{}")
    assert choose_methods(comparison, methods, ["ewc-10"]) == ["ewc-10"]


def test_every_run_is_launched_and_evaluated_and_results_are_not_measured_twice(comparison, launched):
    methods = plan_methods(comparison, **DEFAULTS)
    run_methods(comparison, methods, ["plain", "low-lr"])
    test, train, out = str(comparison.test), comparison.train, comparison.out

    def training(name):
        return ("train.py", "config.py", "run.eval_every=0", *methods[name], f"run.directory={out}", f"run.name={name}")

    def task(model, name):
        json_path = str(out / "results" / f"{name}-task.json")
        return ("scripts/evaluate.py", model, "--data", test, "--train", train, "--json", json_path, "--show", "0")

    def general(name):
        json_path = str(out / "results" / f"{name}-general.json")
        return ("scripts/measure.py", "forgetting", "BASE", str(out / name / "export"), "--json", json_path)

    expected = [task("BASE", "base")]
    for name in ("plain", "low-lr"):
        expected += [training(name), task(str(out / name / "export"), name), general(name)]
    assert launched == expected

    launched.clear()
    run_methods(comparison, methods, ["plain"])
    assert launched == [training("plain")]  # train.py itself finds that the run is finished


def test_launch_uses_torchrun_for_several_processes_and_reports_a_failure(monkeypatch):
    commands, codes = [], iter((0, 0, 1))

    def run(command):
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(subprocess, "run", run)
    room.launch(1, "train.py", "config.py", 5)
    room.launch(2, "train.py", "config.py")
    script = str(room.ROOT / "train.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert commands == [[script, "config.py", "5"], [*torchrun, script, "config.py"]]
    with pytest.raises(UserError, match="train.py failed, see its output above"):
        room.launch(1, "train.py")


def test_results_of_another_test_or_another_base_are_refused(comparison, launched):
    run_methods(comparison, {"plain": []}, ["plain"])
    with pytest.raises(UserError, match="plain-general.json was measured against BASE, not OTHER"):
        run_methods(replace(comparison, base="OTHER"), {"plain": []}, ["plain"])
    comparison.test.write_text("other examples")
    launched.clear()
    with pytest.raises(UserError, match="base-task.json was measured on other examples than"):
        run_methods(comparison, {"plain": []}, ["plain"])
    assert launched == []


def test_there_is_no_table_before_plain_training_has_been_evaluated(comparison, launched):
    methods = plan_methods(comparison, **DEFAULTS)
    assert room.write_comparison(comparison, list(methods)) is None
    run_methods(comparison, methods, ["low-lr"])
    assert room.write_comparison(comparison, list(methods)) is None
    assert not (comparison.out / "comparison.md").exists()
