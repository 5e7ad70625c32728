"""The check on sound runs, and on faults planted in the loop, the data, the disk and one of two ranks: each is named by its line.

Faults that the check's own process finds in data, model and precision are in test_check_step.py and test_check_data.py.
"""

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.config import Config
from configs.load import load_config
from tests.distributed.launch import workplace
from tests.processes import ROOT, run_ranks
from tests.tiny import write_chat_file
from tests.tools.check_faults import write_train
from tests.tools.tiny_run import read
from tools.check import changed_settings
from tools.check_data import FAILS, OK, WARNING
from tools.check_runs import (
    STORED,
    checkpoint_of,
    compare_export,
    first_moments,
    judge_checkpoint,
    judge_export,
    judge_gradient,
    read_sample,
    trained,
)
from tools.check_step import check

WORKER = Path(__file__).with_name("check_worker.py")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, its data, and a config: 2 to 4 micro-batches in each of its 6 steps."""
    folder = tmp_path_factory.mktemp("check")
    return workplace(folder, 48, 6, data="", batch="global_examples=8", run="keep_last=1")


@functools.cache
def reference(folder: Path, *overrides: str) -> str:
    """A directory with what the check's own process finds for these settings."""
    out = folder / f"reference{len(list(folder.glob('reference*')))}"
    out.mkdir()
    torch.set_num_threads(1)
    config: Config = load_config(folder / "config.py", list(overrides))
    check(read(config), out / "step.json")
    results = json.loads((out / "step.json").read_text())["results"]
    assert FAILS not in {result["status"] for result in results}, results
    return str(out)


def launch(folder: Path, name: str, ranks: int, plan: dict) -> tuple[int, str]:
    """(exit code, output) of check_worker.py with this plan."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(plan))
    done = run_ranks(ranks, WORKER, file, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    return done.returncode, done.stdout + done.stderr


def parts(folder: Path, name: str, ranks: int, plan: dict) -> dict[str, dict[str, dict]]:
    """part -> name of a line -> its result."""
    code, output = launch(folder, name, ranks, {"config": str(folder / "config.py"), **plan})
    assert code == 0, output[-5000:]
    found = json.loads((folder / f"{name}.results.json").read_text())
    return {part: {result["name"]: result for result in results} for part, results in found.items()}


def failing(results: dict[str, dict]) -> set[str]:
    """The names of the lines that fail."""
    return {name for name, result in results.items() if result["status"] == FAILS}


def test_a_sound_run_passes_on_two_ranks_and_leaves_nothing(folder) -> None:
    out = folder / "sound-report.json"
    runs = folder / "sound-runs"
    command = [str(folder / "config.py"), f"run.directory={runs}", "--json", str(out)]
    code, output = launch(folder, "sound", 2, {"check": ["--train", str(write_train(folder)), *command]})
    assert code == 0, output[-5000:]
    report = json.loads(out.read_text())
    found = {(result["group"], result["name"]): result for result in report["results"]}
    assert {key: r["status"] for key, r in found.items() if r["status"] != OK} == {}, output
    assert found["run", "kill and resume"]["figures"]["relative"] == 0.0
    assert "to the bit" in found["run", "kill and resume"]["text"]
    assert 0 < found["run", "other ranks"]["figures"]["relative"] < 1e-3
    assert found["run", "gradient norm"]["figures"]["relative"] < 1e-5
    assert found["run", "gradient"]["figures"]["tensors"] == found["run", "updates"]["figures"]["tensors"] == 20
    assert found["machine", "planned memory"]["figures"]["steps"] == 6
    assert report["machine"]["ranks"] == 2 and report["exit_code"] == 0 and report["versions"]["torch"]
    assert output.count("kill and resume") == 1 and f"{len(found)} checks in" in output  # rank 0 alone speaks
    assert not runs.exists()


# Fault of check_faults.py -> (the lines that fail, words of one of them).
LOOPS = {
    "micro-batches averaged": ({"gradient norm", "gradient"}, "divide the sum of all losses once"),
    "last micro-batch dropped": ({"loss", "gradient norm", "gradient"}, "a micro-batch is left out"),
    "optimizer not restored": ({"kill and resume"}, "not all state is saved and restored"),
    "vectors not updated": ({"updates"}, "5 of 20 trained tensors did not move"),
    "gradient of a layer lost": ({"gradient"}, "model.layers.1.mlp.down_proj.weight"),
}
SOUND = {  # name -> overrides: no line fails in any precision. That of fp32 is the straight run of `optimizer not restored`.
    "bf16": ["model.compute_dtype=bf16"],
    "6N": ["model.compute_dtype=bf16", "optimizer.memory=6N"],
}


@pytest.fixture(scope="module")
def loops(folder) -> dict[str, dict[str, dict]]:
    """What is found in each edited train.py, the kill only where it matters; on one rank."""
    plain, sound = reference(folder), str(write_train(folder))
    todo = [
        {
            "name": name,
            "do": "resumed" if "kill and resume" in wrong else "straight",
            "script": str(write_train(folder, name)),
            "reference": plain,
            "keep": name == "optimizer not restored",
        }
        for name, (wrong, _) in LOOPS.items()
    ]
    for name, overrides in SOUND.items():
        part = {"do": "straight", "overrides": overrides, "reference": reference(folder, *overrides)}
        todo.append({"name": name, "script": sound, **part})
        if name == "bf16":
            todo.append({"name": "dropout", "script": str(write_train(folder, "dropout before the head")), **part})
    return parts(folder, "loops", 1, {"parts": todo})


@pytest.mark.parametrize("fault", LOOPS)
def test_faults_of_a_loop(loops, fault) -> None:
    wrong, words = LOOPS[fault]
    assert failing(loops[fault]) == wrong, {name: result["text"] for name, result in loops[fault].items()}
    assert any(words in loops[fault][name]["text"] for name in wrong), [loops[fault][name]["text"] for name in wrong]


def test_another_clip_and_an_export_of_other_weights(folder, loops, tmp_path) -> None:
    """A sound run is held against another optimizer.max_grad_norm, and against an export that was changed."""
    run = Path(shutil.copytree(folder / "runs" / ".check-optimizer-not-restored" / "straight", tmp_path / "straight"))
    record = json.loads((run / "config.json").read_text())
    record["config"]["optimizer"]["max_grad_norm"] = 0.25
    (run / "config.json").write_text(json.dumps(record))
    first, found = checkpoint_of(run, 1), json.loads((folder / "reference0" / "step.json").read_text())["reference"]
    sample, names = read_sample(folder / "reference0" / "step.safetensors", found["eps"]), trained(first)
    assert sample
    result = judge_gradient(run, found, sample, STORED["16N"], first_moments(first, sample.tensors, names))
    assert result.status == FAILS and "clip it once, to optimizer.max_grad_norm=0.25" in result.text, result.text
    tensors = load_file(run / "export" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, run / "export" / "model.safetensors", {"format": "pt"})
    compared = compare_export(run / "export", checkpoint_of(run, 3), names)
    result = judge_export(run, load_config(folder / "config.py"), [*compared.items()])
    assert result.status == FAILS and "not those of the last checkpoint, the first is model.norm.weight" in result.text


@pytest.mark.parametrize("name", SOUND)
def test_sound_runs_of_all_precisions(loops, name) -> None:
    found = {line: (result["status"], result["text"]) for line, result in loops[name].items()}
    assert {status for status, _ in found.values()} <= {OK}, found


def test_dropout_before_the_head_is_beyond_the_rounding_of_bf16(loops) -> None:
    assert {"gradient"} <= failing(loops["dropout"]), {
        name: result["text"] for name, result in loops["dropout"].items()
    }


def test_a_disk_that_is_too_small(tmp_path, monkeypatch) -> None:
    """run.keep_last=1: that one, the best and the one being written are 3 GiB; the export is 0.25 GiB."""
    measured = {"checkpoint": 2**30, "save_seconds": 12.0, "export": 2**28}
    usage = shutil.disk_usage(tmp_path)
    found = []
    for free, grace in ((3, None), (4, None), (4, 30.0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free * 2**30))
        found.append(judge_checkpoint(tmp_path, measured, 1, grace))
    assert [result.status for result in found] == [FAILS, OK, WARNING]
    assert "3.2 of 3.0 GiB free: free some space or lower run.keep_last" in found[0].text
    assert found[2].text.endswith("--shutdown-timeout=50")


def test_faults_of_two_ranks(folder) -> None:
    """Data that depend on the number of ranks, a mean over ranks, stale data on rank 1, a child that fails alone."""
    places = [folder / "node-0", folder / "node-1"]
    for rank, place in enumerate(places):
        place.mkdir()
        write_chat_file(place / "train.jsonl", 48, seed=rank)
    relative = folder / "relative.py"
    relative.write_text((folder / "config.py").read_text().replace('here + "/train.jsonl"', '"train.jsonl"'))
    fails = folder / "fails.py"
    fails.write_text(
        "import os, time\nif os.environ['RANK'] == '1':\n    raise ValueError('only here')\ntime.sleep(600)\n"
    )
    todo = [
        {"name": "by ranks", "do": "fewer", "script": str(write_train(folder, "data by the number of ranks"))},
        {
            "name": "averaged",
            "do": "straight",
            "script": str(write_train(folder, "ranks averaged")),
            "reference": reference(folder),
        },
        {"name": "fails", "do": "one_fails", "script": str(fails)},
    ]
    todo.append({"name": "stale", "do": "straight", "script": str(write_train(folder)), "config": str(relative)})
    found = parts(folder, "ranks", 2, {"folders": [str(place) for place in places], "parts": todo})
    assert failing(found["by ranks"]) == {"other ranks"}
    assert "depends on the number of ranks" in found["by ranks"]["other ranks"]["text"]
    assert failing(found["averaged"]) == {"gradient norm"}
    assert "rank 1 on host" in found["fails"]["one fails"]["text"]
    assert found["fails"]["one fails"]["text"].endswith("ValueError: only here")
    stale = found["stale"]["three steps"]
    assert stale["status"] == FAILS and "rank 1 on host" in stale["text"] and "data.train" in stale["text"]


def test_a_directory_that_the_nodes_do_not_share(folder) -> None:
    places = [folder / "disk-0", folder / "disk-1"]
    for place in places:
        place.mkdir()
    arguments = ["--train", str(write_train(folder)), str(folder / "config.py"), "run.directory=runs"]
    plan = {"check": arguments, "folders": [str(place) for place in places], "alone": True}
    code, output = launch(folder, "unshared", 2, plan)
    assert code != 0, output[-5000:]
    errors = {line for line in output.splitlines() if line.startswith("error: ")}  # each node says it
    assert len(errors) == 1 and "not the same directory on every node" in errors.pop(), output
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_mistakes_end_in_one_sentence(folder) -> None:
    """Data without an example, a file that is not there, and more layers than the model has: exit code 2, and nothing is left."""
    runs = folder / "mistakes"
    (folder / "empty.jsonl").write_text("")
    mistakes = {
        f"data.train={folder / 'empty.jsonl'}": "empty.jsonl",
        "data.train=nowhere.jsonl": "nowhere.jsonl",
        "--layers=2": "the model has 2 layers",
    }
    checks = [[str(folder / "config.py"), mistake, f"run.directory={runs}"] for mistake in mistakes]
    code, output = launch(folder, "mistakes", 1, {"config": str(folder / "config.py"), "checks": checks, "parts": []})
    assert code == 0 and output.count("exit code 2\n") == len(mistakes), output
    errors = [line for line in output.splitlines() if "error" in line.lower()]
    assert len(errors) == len(mistakes), output
    for words, error in zip(mistakes.values(), errors, strict=True):
        assert error.startswith("error: ") and words in error, error
    assert not runs.exists()


def test_the_runs_of_a_check_have_no_dropout_because_the_reference_has_none(folder) -> None:
    config = load_config(folder / "config.py", ["lora.rank=4", "lora.dropout=0.1"])
    made = SimpleNamespace(config=config, scratch="scratch", model=None)
    assert changed_settings(made, "straight")["lora.dropout"] == 0.0
