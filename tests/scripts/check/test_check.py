"""The check passes sound runs, and names each fault that is planted in the loop, the data, the disk or a single rank.

test_step.py and test_data.py plant the faults of data, model and precision.
"""

import functools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from configs.load import load_config
from scripts.check.command import all_checks, changed_settings, fewer_ranks
from scripts.check.reference import REFERENCE, Reference
from scripts.check.runs import (
    STORED,
    Check,
    first_moments,
    judge_export,
    judge_gradient,
    read_rows,
)
from scripts.check.step import LINES, check
from scripts.check.tensors import compare_export, trained
from scripts.check.updates import checkpoint_of
from tests.distributed.launch import workplace
from tests.processes import ROOT, run_ranks
from tests.scripts.check.faults import write_train
from tests.scripts.check.tiny_run import read
from tests.tiny import write_chat_file
from training.check_result import FAILS, OK, SKIPPED

WORKER = Path(__file__).with_name("check_worker.py")
AUXILIARY, BF16 = "model.router_aux=0.1", "model.compute_dtype=bf16"
LINES_OF_RUNS = (
    "three steps",
    "loss",
    "gradient norm",
    "gradient",
    "updates",
    "export",
    "kill and resume",
    "other ranks",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write tiny models with data and configs: a dense model with 2 to 4 micro-batches in each of 6 steps, and two with experts."""
    folder = tmp_path_factory.mktemp("check")
    batch = {"data": "", "batch": "global_examples=8", "run": "keep_last=1"}
    for family in ("qwen3_moe", "gpt_oss"):
        (folder / family).mkdir()
        workplace(folder / family, 24, 6, {"family": family, "tied": False}, **batch | {"batch": "global_examples=6"})
    return workplace(folder, 48, 6, **batch)


@functools.cache
def reference(folder: Path, *overrides: str) -> str:
    """Compute the reference of `folder`/config.py with these settings, and return its file."""
    out = folder / f"reference-{'-'.join(overrides)}"
    torch.set_num_threads(1)
    check(read(load_config(folder / "config.py", overrides)), out)
    lines = json.loads((out / LINES).read_text())
    assert FAILS not in {line["status"] for line in lines}, lines
    return str(out / REFERENCE)


def launch(folder: Path, name: str, ranks: int, plan: dict) -> tuple[dict[str, dict[str, dict]], str]:
    """Run check_worker.py with this plan, and return (part -> name of a line -> its result, output)."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"config": str(folder / "config.py"), **plan}))
    done = run_ranks(ranks, WORKER, file, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    results_by_part = json.loads(file.with_suffix(".results.json").read_text())
    return {part: {result["name"]: result for result in results} for part, results in results_by_part.items()}, output


def with_status(results: dict[str, dict], status: str = FAILS) -> set[str]:
    """Return the names of the lines with this status."""
    return {name for name, result in results.items() if result["status"] == status}


# ---- one rank ----------------------------------------------------------------------------------------------------------

# Fault of faults.py -> (the lines that fail, words of a failing line).
LOOPS = {
    "micro-batches averaged": ({"gradient norm", "gradient"}, "divide the sum of all losses once"),
    "last micro-batch dropped": ({"loss", "gradient norm", "gradient"}, "a micro-batch is left out"),
    "optimizer not restored": ({"kill and resume"}, "not all state is saved and restored"),
    "vectors not updated and gradient of a layer lost": (
        {"updates", "gradient"},
        "5 of 20 trained tensors did not move",
    ),
}
IN_BF16 = ("dropout before the head", "wrong weights")  # faults of a run in bf16
# Name -> (folder, overrides) of runs without a fault. The run in fp32 is the straight run of `optimizer not restored`.
SOUND = {
    "bf16": ("", [BF16]),
    "6N": ("", [BF16, "optimizer.memory=6N"]),
    "sinks and experts": ("gpt_oss", [BF16]),
    "auxiliary loss": ("qwen3_moe", [AUXILIARY]),
}
# Argument of scripts/check.py -> words of the error.
MISTAKES = {
    "data.train={folder}/empty.jsonl": "empty.jsonl",
    "data.train=nowhere.jsonl": "nowhere.jsonl",
    "--layers=2": "the model has 2 layers",
}


@pytest.fixture(scope="module")
def on_one_rank(folder) -> tuple[dict[str, dict[str, dict]], str]:
    """Check each edited train.py, with a kill only where it matters, sound runs, and mistakes, on one rank."""
    plain, sound, todo = reference(folder), str(write_train(folder)), list[dict]()
    for name, (wrong, _) in LOOPS.items():
        do = "resumed" if "kill and resume" in wrong else "straight"
        part = {"name": name, "do": do, "script": str(write_train(folder, name)), "reference": plain}
        todo.append(part | {"keep": do == "resumed"})
    for name, (family, overrides) in SOUND.items():
        part = {"do": "straight", "overrides": overrides, "config": str(folder / family / "config.py")}
        todo.append({"name": name, "script": sound, "reference": reference(folder / family, *overrides)} | part)
    in_bf16 = next(part for part in todo if part["name"] == "bf16")
    todo += [in_bf16 | {"name": fault, "script": str(write_train(folder, fault))} for fault in IN_BF16]
    (folder / "empty.jsonl").write_text("")
    runs = f"run.directory={folder / 'mistakes'}"
    checks = [[str(folder / "config.py"), mistake.format(folder=folder), runs] for mistake in MISTAKES]
    return launch(folder, "one", 1, {"parts": todo, "checks": checks})


@pytest.mark.parametrize("fault", LOOPS)
def test_faults_of_a_loop(on_one_rank, fault) -> None:
    (wrong, words), lines = LOOPS[fault], on_one_rank[0][fault]
    assert with_status(lines) == wrong, {name: result["text"] for name, result in lines.items()}
    assert any(words in lines[name]["text"] for name in wrong), [lines[name]["text"] for name in wrong]
    assert "lost" not in fault or "model.layers.1.mlp.down_proj.weight" in lines["gradient"]["text"]


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_passes_in_every_precision(on_one_rank, name) -> None:
    lines = on_one_rank[0][name]
    unknown = {"gradient norm", "gradient"} if name == "auxiliary loss" else set()
    assert {"loss", "gradient norm", "gradient", "updates", "export"} <= lines.keys()
    assert with_status(lines, SKIPPED) == unknown and with_status(lines, OK) == lines.keys() - unknown, lines
    assert not unknown or "the reference knows no auxiliary loss of the routers" in lines["gradient"]["text"]


@pytest.mark.parametrize("fault", IN_BF16)
def test_a_fault_is_more_than_bf16_rounding(on_one_rank, fault) -> None:
    assert "gradient" in with_status(on_one_rank[0][fault]), on_one_rank[0][fault]


def test_mistakes_end_in_one_sentence(folder, on_one_rank) -> None:
    """Data without an example, a missing file, and more layers than the model has: exit code 2, and no file is left."""
    assert on_one_rank[1].count("exit code 2\n") == len(MISTAKES), on_one_rank[1]
    errors = [line for line in on_one_rank[1].splitlines() if "error" in line.lower()]
    for words, error in zip(MISTAKES.values(), errors, strict=True):
        assert error.startswith("error: ") and words in error, error
    assert not (folder / "mistakes").exists()


def test_a_wrong_clip_and_export_fail(folder, on_one_rank, tmp_path) -> None:
    """Compare a sound run with a wrong optimizer.max_grad_norm, and with a changed export."""
    run = Path(shutil.copytree(folder / "runs" / ".check-optimizer-not-restored" / "straight", tmp_path / "straight"))
    config, first = load_config(folder / "config.py"), checkpoint_of(run, 1)
    expected = Reference.load(Path(reference(folder)))
    assert expected
    moments = first_moments(first, expected.tensors, trained(first))
    settings = vars(config.optimizer) | {"max_grad_norm": 0.25}
    result = judge_gradient(first, settings, expected, read_rows(run)[1], STORED["16N"], moments)
    assert result.status == FAILS and "clip it once, to optimizer.max_grad_norm=0.25" in result.text, result.text
    tensors = load_file(run / "export" / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, run / "export" / "model.safetensors", {"format": "pt"})
    compared = compare_export(run / "export", checkpoint_of(run, 3), trained(first))
    result = judge_export(run / "export", [*compared.items()])
    assert result.status == FAILS and "not those of the last checkpoint, the first is model.norm.weight" in result.text
    unchanged = [item for item in compared.items() if item[0] != "model.norm.weight"]
    added = ("value_head.weight", False)  # by an edited train.py
    assert judge_export(run / "export", [*unchanged, added]).status == OK


# ---- two ranks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_two_ranks(folder) -> tuple[dict[str, dict[str, dict]], str]:
    """Check a sound run with experts whose ranks share tokens, and four faults, on two ranks."""
    places = [folder / "node-0", folder / "node-1"]
    for rank, place in enumerate(places):
        place.mkdir()
        write_chat_file(place / "train.jsonl", 48, seed=rank)
    relative, fails, sound = folder / "relative.py", folder / "fails.py", str(write_train(folder))
    relative.write_text((folder / "config.py").read_text().replace('here + "/train.jsonl"', '"train.jsonl"'))
    fails.write_text(
        "import os, time\nif os.environ['RANK'] == '1':\n    raise ValueError('only here')\ntime.sleep(600)\n"
    )
    averaged = {"script": str(write_train(folder, "ranks averaged")), "reference": reference(folder)}
    parts = [
        {"name": "by ranks", "do": "fewer", "script": str(write_train(folder, "data by the number of ranks"))},
        {"name": "averaged", "do": "straight"} | averaged,
        {"name": "fails", "do": "one_fails", "script": str(fails)},
        {"name": "stale", "do": "straight", "script": sound, "config": str(relative)},
    ]
    more = ["sharding.context=2", f"run.directory={folder / 'sound'}", "--json", str(folder / "report.json")]
    checks = [["--train", sound, str(folder / "qwen3_moe" / "config.py"), *more]]
    return launch(folder, "two", 2, {"folders": [str(place) for place in places], "parts": parts, "checks": checks})


def test_a_sound_run_passes_on_two_ranks(folder, on_two_ranks) -> None:
    report, output = json.loads((folder / "report.json").read_text()), on_two_ranks[1]
    lines = {(result["group"], result["name"]): result for result in report["results"]}
    assert {key: line["status"] for key, line in lines.items() if line["status"] != OK} == {}, output
    assert lines.keys() == {("data", "EOS"), ("model", "isolation"), *(("run", name) for name in LINES_OF_RUNS)}
    assert "to the bit" in lines["run", "kill and resume"]["text"]
    (weights,) = re.findall("weights (.*) of the step's length", lines["run", "other ranks"]["text"])
    assert 0 < float(weights) < 1e-3
    assert report["exit_code"] == 0
    assert output.count("kill and resume") == 1 and f"{len(lines)} checks in" in output  # only rank 0 prints
    assert not (folder / "sound").exists()


def test_faults_of_two_ranks(on_two_ranks) -> None:
    """Data that depend on the number of ranks, a mean over ranks, a child that fails alone, stale data on rank 1."""
    lines_by_part = on_two_ranks[0]
    assert with_status(lines_by_part["by ranks"]) == {"other ranks"}
    assert "depends on the number of ranks" in lines_by_part["by ranks"]["other ranks"]["text"]
    assert with_status(lines_by_part["averaged"]) == {"gradient norm", "gradient"}
    assert "rank 1 on host" in lines_by_part["fails"]["one fails"]["text"]
    assert lines_by_part["fails"]["one fails"]["text"].endswith("ValueError: only here")
    stale = lines_by_part["stale"]["three steps"]
    assert stale["status"] == FAILS and "rank 1 on host" in stale["text"] and "data.train" in stale["text"]


def test_a_directory_that_the_nodes_do_not_share(folder) -> None:
    places = [folder / "disk-0", folder / "disk-1"]
    for place in places:
        place.mkdir()
    arguments = ["--train", str(write_train(folder)), str(folder / "config.py"), "run.directory=runs"]
    plan = {"checks": [arguments], "folders": [str(place) for place in places], "alone": True, "parts": []}
    _, output = launch(folder, "unshared", 2, plan)
    errors = {line for line in output.splitlines() if line.startswith("error: ")}  # each node prints it
    assert output.count("exit code 2") == 2, output
    assert len(errors) == 1 and "not the same directory on every node" in errors.pop(), output
    assert [path.name for place in places for path in place.rglob("*") if path.is_file()] == ["run.lock"]


# ---- no launch ---------------------------------------------------------------------------------------------------------


def test_files_of_a_killed_check_are_removed(folder, ranks, tmp_path, monkeypatch) -> None:
    """The path of the scratch directory is relative."""
    monkeypatch.chdir(tmp_path)
    check = Check(load_config(folder / "config.py", ["run.directory=runs"]), Path("train.py"), (), ranks, print)
    (check.scratch / "straight" / "checkpoints").mkdir(parents=True)
    names = []

    def probe(check: Check) -> None:
        names.extend(path.name for path in check.scratch.iterdir())
        raise UserError("it ends here")

    monkeypatch.setattr("scripts.check.command.probe", probe)
    with pytest.raises(UserError, match="it ends here"):
        all_checks(check, None)
    assert names == ["run.lock"] and not Path("runs").exists()


def test_other_ranks_are_skipped_with_a_reason(folder, monkeypatch) -> None:
    monkeypatch.setattr("scripts.check.command.world_size_from_environment", lambda: (4, 2))
    sharding = ["sharding.strategy=hybrid", "sharding.shard_size=4", "sharding.reduce_dtype=fp32"]
    check = Check(
        load_config(folder / "config.py", sharding), Path("train.py"), (), SimpleNamespace(world_size=4), print
    )
    fewer_ranks(check)
    (result,) = check.results
    assert result.status == SKIPPED, result.text
    assert result.text.startswith("this config does not run on 2 ranks: sharding.strategy=hybrid: 2 ranks"), result.text


def test_other_ranks_are_skipped_with_auxiliary_loss(folder, monkeypatch) -> None:
    monkeypatch.setattr("scripts.check.command.world_size_from_environment", lambda: (2, 2))
    config = load_config(folder / "qwen3_moe" / "config.py", [AUXILIARY, "lora.rank=4", "lora.dropout=0.1"])
    check = Check(config, Path("train.py"), (), SimpleNamespace(world_size=2), print)
    fewer_ranks(check)
    (result,) = check.results
    assert result.status == SKIPPED and "the routers' auxiliary loss counts choices" in result.text
    assert changed_settings(check, "straight")["lora.dropout"] == 0.0  # as in the reference
    assert changed_settings(check, "straight")["run.stop_at"] is None  # a run that stops exports nothing
    # or a config with a share, like sft.py, would hold out examples of the reference when data.validation is taken away
    assert changed_settings(check, "straight")["data.validation_share"] == config.data.validation_share == 0.0
