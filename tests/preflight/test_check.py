"""`train.py --check` on a sound run, and faults planted in the loop, the data, the disk and one of two ranks: each is named.

Faults in data, model and precision that the probe finds are in test_data.py, test_model.py and test_precision.py; those of
`test_faults_of_a_config` show that a check reports them.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from configs.config import Config
from configs.loading.config_file import load_config
from preflight.context import SAMPLE
from preflight.model import load_packed, packed_losses
from preflight.probe import Report, check
from preflight.reference import compute, load_reference, micro_batches_of_documents
from preflight.result import FAILS, OK, SKIPPED
from preflight.shares import write_sample
from tests.preflight.faults import EDITS, write_train
from tests.preflight.tiny_run import read
from tests.processes import ROOT, run_ranks
from tests.tiny import CHATML, write_chat_file, write_tiny_model

WORKER = Path(__file__).with_name("check_worker.py")
RESUME, OTHER_RANKS, STEPS, LOSS, NORM = "kill and resume", "other ranks", "three steps", "loss", "gradient norm"
SHARES = "shares"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, its data, and a config: 2 to 4 micro-batches in each of its 6 steps."""
    folder = tmp_path_factory.mktemp("check")
    write_tiny_model(folder / "model")
    write_chat_file(folder / "train.jsonl", 48)
    write_chat_file(folder / "validation.jsonl", 6, seed=1)
    (folder / "config.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(folder / "model")!r}, compute_dtype="fp32"),
    data=Data(
        ({str(folder / "train.jsonl")!r},), ({str(folder / "validation.jsonl")!r},), sequence_length=256,
        cache={str(folder / "tokens")!r},
    ),
    batch=Batch(global_examples=8, micro_batch=1),
    optimizer=Optimizer(1e-3, epochs=1),
    run=Run("base", directory={str(folder / "runs")!r}, keep_last=1),
)
""")
    return folder


@pytest.fixture(scope="module")
def reference(folder) -> dict:
    """Loss and gradient norm of step 1, as the probe computes them."""
    run = read(load_config(folder / "config.py"))
    torch.set_num_threads(1)
    documents, _ = packed_losses(run, load_packed(run))
    found = load_reference(run, documents)
    assert found is not None
    compute(found, 60.0)
    assert found.sample is not None
    write_sample(folder / SAMPLE, found.sample, micro_batches_of_documents(run))
    return dict(found.as_json())


def launch(folder: Path, name: str, ranks: int, plan: dict) -> tuple[int, str]:
    """(exit code, output) of check_worker.py with this plan."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(plan))
    done = run_ranks(ranks, WORKER, file, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", **plan.get("environment", {}))
    return done.returncode, done.stdout + done.stderr


def parts(folder: Path, name: str, ranks: int, plan: dict) -> dict[str, dict[str, dict]]:
    """part -> name of a result -> result."""
    code, output = launch(folder, name, ranks, {"config": str(folder / "config.py"), **plan})
    assert code == 0, output[-5000:]
    found = json.loads((folder / f"{name}.results.json").read_text())
    return {part: {result["name"]: result for result in results} for part, results in found.items()}


@pytest.mark.slow
def test_a_sound_run_passes_on_two_ranks_and_leaves_nothing(folder) -> None:
    out = folder / "sound-report.json"
    arguments = [str(write_train(folder)), str(folder / "config.py"), "--check", "--json", str(out)]
    code, output = launch(folder, "sound", 2, {"check": arguments})
    assert code == 0, output[-5000:]
    report = json.loads(out.read_text())
    found = {(result["group"], result["name"]): result for result in report["results"]}
    assert {key: r["status"] for key, r in found.items() if r["status"] not in (OK, SKIPPED)} == {}, output
    skipped = {name for (_, name), result in found.items() if result["status"] == SKIPPED}
    assert skipped <= {"clocks", "time to save"}
    assert found["run", RESUME]["figures"]["relative"] == 0.0 and "to the bit" in found["run", RESUME]["text"]
    assert 0 < found["run", OTHER_RANKS]["figures"]["relative"] < 1e-3
    assert found["run", NORM]["figures"]["relative"] < 1e-5
    assert found["machine", "planned memory"]["figures"]["steps"] == 6
    assert report["machine"]["ranks"] == 2 and report["exit_code"] == 0 and report["versions"]["torch"]
    assert output.count("kill and resume") == 1 and f"{len(found)} checks in" in output  # rank 0 alone speaks
    assert not (folder / "runs").exists()


@pytest.fixture(scope="module")
def loops(folder, reference) -> dict[str, dict[str, dict]]:
    """What is found in each edited train.py, the kill only where it matters; on one rank."""
    kinds = {"optimizer not restored": "resumed"}
    return parts(
        folder,
        "loops",
        1,
        {
            "parts": [
                {
                    "name": name,
                    "do": kinds.get(name, "straight"),
                    "script": str(write_train(folder, name)),
                    "reference": reference,
                    "sample": str(folder / SAMPLE),
                }
                for name in EDITS
                if name != "data by the number of ranks"
            ]
            + [{"name": "disk", "do": "small_disk", "free": [1.5 * 2**30, 2.5 * 2**30, 4 * 2**30]}]
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, wrong, words",
    [
        ("micro-batches averaged", {NORM, SHARES}, "divide the sum of all losses once"),
        ("wrong divisor", {NORM}, "by the targets of the whole step"),
        ("last micro-batch dropped", {LOSS, NORM, SHARES}, "a micro-batch is left out"),
        ("leak in the loop", {LOSS, NORM}, "see each other"),
        ("optimizer not restored", {RESUME}, "not all state is saved and restored"),
        ("nothing is trained", {STEPS, SHARES}, "no weight has changed"),
        ("not clipped", {SHARES}, "clip it once, to optimizer.max_grad_norm=1"),
    ],
)
def test_faults_of_a_loop(loops, fault, wrong, words) -> None:
    found = loops[fault]
    assert {name for name, result in found.items() if result["status"] == FAILS} == wrong, found
    assert any(words in found[name]["text"] for name in wrong)


@pytest.mark.slow
def test_a_disk_that_is_too_small(loops) -> None:
    """run.keep_last=1: that one, the best and the one being written are 3 GiB; the export is 0.25 GiB."""
    found = loops["disk"]
    assert {name: result["status"] for name, result in found.items()} == {
        "1.5 GiB": FAILS,
        "2.5 GiB": FAILS,
        "4 GiB": OK,
    }
    assert "the last one stays until a new one is complete" in found["1.5 GiB"]["text"]
    assert "lower run.keep_last" in found["2.5 GiB"]["text"]


@pytest.mark.slow
def test_faults_of_two_ranks(folder, reference) -> None:
    """Data that depend on the number of ranks, another train.py and stale data on rank 1, a signal: each ends all ranks."""
    places = [folder / "node-0", folder / "node-1"]
    for rank, place in enumerate(places):
        place.mkdir()
        write_chat_file(place / "train.jsonl", 48, seed=rank)
    config = folder / "relative.py"
    config.write_text((folder / "config.py").read_text().replace(str(folder / "train.jsonl"), "train.jsonl"))
    scripts = [write_train(folder), write_train(folder, "wrong divisor")]
    same = {"reference": reference, "script": str(scripts[0])}
    ranks = write_train(folder, "data by the number of ranks")
    found = parts(
        folder,
        "ranks",
        2,
        {
            "parts": [
                {**same, "name": "by ranks", "do": "fewer", "script": str(ranks)},
                {**same, "name": "code", "do": "other_code", "scripts": [str(script) for script in scripts]},
                {**same, "name": "signal", "do": "interrupted"},
            ]
        },
    )
    assert found["by ranks"][OTHER_RANKS]["status"] == FAILS
    assert "depends on the number of ranks" in found["by ranks"][OTHER_RANKS]["text"]
    assert found["code"]["ranks agree"]["status"] == FAILS
    assert (
        "rank 1 on host" in found["code"]["ranks agree"]["text"] and "train.py" in found["code"]["ranks agree"]["text"]
    )
    assert found["signal"]["interrupted"]["text"] == "SIGTERM"
    assert found["signal"]["interrupted"]["figures"]["codes"] == [-9]
    stale = parts(
        folder,
        "stale",
        2,
        {
            "config": str(config),
            "folders": [str(place) for place in places],
            "parts": [{**same, "name": "stale", "do": "straight"}],
        },
    )["stale"][STEPS]
    assert stale["status"] == FAILS and "rank 1 on host" in stale["text"] and "data.train" in stale["text"]


@pytest.mark.slow
def test_a_directory_that_the_nodes_do_not_share(folder) -> None:
    places = [folder / "disk-0", folder / "disk-1"]
    for place in places:
        place.mkdir()
    arguments = [str(write_train(folder)), str(folder / "config.py"), "run.directory=runs", "--check"]
    plan = {"check": arguments, "folders": [str(place) for place in places], "alone": True}
    code, output = launch(folder, "unshared", 2, plan)
    assert code == 1, output[-5000:]
    line = next(line for line in output.splitlines() if "shared disk" in line and line.startswith("fails"))
    assert "not the same directory on every node" in line and "rank 1" in line
    assert [list(place.iterdir()) for place in places] == [[], []]


def check_config(folder: Path, config: Config) -> dict[str, str]:
    """name -> status of everything that the probe finds."""
    report = Report(folder / "probe.json")
    run = read(config)
    torch.set_num_threads(1)
    check(run, report, 60.0)
    return {f"{result.group} {result.name}": result.status for result in report.results}


def test_faults_of_a_config(folder) -> None:
    """EOS dropped by the template, validation in training, most answers cut off, a rate that is too low, NaN weights."""
    config = load_config(folder / "config.py")
    bad = folder / "bad"
    bad.mkdir()
    (bad / "template.jinja").write_text(CHATML.replace("<|im_end|>", ""))
    data = dataclasses.replace(
        config.data,
        train=(*config.data.train, *config.data.validation),
        chat_template=str(bad / "template.jinja"),
        sequence_length=64,
        too_long="truncate",
        cache=None,
    )
    rate = dataclasses.replace(config.optimizer, learning_rate=1e-7, memory="8N")
    found = check_config(bad, dataclasses.replace(config, data=data, optimizer=rate))
    for name in ("data EOS", "data lost", "data validation", "precision movement"):
        assert found[name] == FAILS, found
    shutil.copytree(config.model.path, bad / "model")
    weights = load_file(bad / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, bad / "model" / "model.safetensors", {"format": "pt"})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(bad / "model")))
    assert check_config(bad, config)["precision finite"] == FAILS


def test_a_config_that_names_what_is_not_there_is_a_mistake(folder, monkeypatch) -> None:
    from configs.loading.command_line import Command
    from preflight.start import check_inputs

    config = load_config(folder / "config.py", ["data.train=nowhere.jsonl"])
    with pytest.raises(UserError, match="nowhere.jsonl"):
        check_inputs(Command(config, (str(folder / "config.py"),), check=True), 1)
