"""The recipes of README's "Edit the loop": each patch applies to train.py, and the edited loop trains, logs and resumes.

Every recipe trains on two ranks with an untied head; the losses also on one rank and with a tied one. Recipes that keep a state of
their own are stopped and continued, on the same number of ranks, and end with the weights of a run that was not stopped; an
optimizer also on another number. The check (`--check`) of one of each kind starts it, kills it and resumes it.
"""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import largest_difference, launch, rows, run_of, weights
from tests.processes import ROOT, run_ranks
from tests.tiny import write_chat_file, write_tiny_model
from tests.tools.check_faults import END
from training.record import Record

RECIPES = {patch.stem: patch for patch in sorted((ROOT / "docs" / "recipes").glob("*.patch"))}
LOSSES = ("z_loss", "label_smoothing", "dft")
RESUMED = ("sgd", "nadam", "ema", "l2_to_start", "frozen_layers")
MOVED = ("nadam",)
CHECKED = ("dft", "sgd", "wsd", "ema", "l2_to_start", "frozen_layers")  # one of each kind
STEPS, IN_STEP_4 = 6, 6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_tiny_model(folder / "tied")
    write_tiny_model(folder / "untied", tied=False)
    for name in ("main", "other"):
        write_chat_file(folder / f"{name}.jsonl", 24, seed=len(name))
    (folder / "config.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(folder / "untied")!r}, compute_dtype="fp32"),
    data=Data(
        ({str(folder / "main.jsonl")!r},), mix=(Source("other", ({str(folder / "other.jsonl")!r},), 0.3),),
        sequence_length=256, cache=None,
    ),
    batch=Batch(global_examples=8, micro_batch=2),
    optimizer=Optimizer(1e-3, epochs=2, warmup_steps=0),
    run=Run("base", directory={str(folder / "runs")!r}, save_every=3),
)
""")
    return folder


def edited(folder: Path, name: str) -> Path:
    """A copy of train.py with the recipe applied."""
    tree = folder / name
    tree.mkdir(parents=True)
    plain = (ROOT / "train.py").read_text()
    (tree / "train.py").write_text(plain)
    subprocess.run(["git", "apply", str(RECIPES[name])], cwd=tree, check=True, capture_output=True)
    text = (tree / "train.py").read_text()
    assert text != plain
    body, main, last = text.rpartition('if __name__ == "__main__":\n')
    assert END.endswith(main)
    (tree / "train.py").write_text(body + END + last)
    return tree / "train.py"


@pytest.fixture(scope="module")
def scripts(folder) -> dict[str, Path]:
    """Recipe -> its train.py."""
    return {name: edited(folder / "scripts", name) for name in RECIPES}


@pytest.fixture(scope="module")
def runs(folder, scripts) -> Path:
    """All runs, in one launch for each number of ranks. NAME-RANKS is the recipe, `plain` the loop as it is.

    NAME-again and NAME-alone are stopped on two ranks. NAME-again goes on there, NAME-alone on one.
    """

    def of(name: str, run: str, *overrides: str, plant: str | None = None) -> dict:
        return run_of(folder, run, *overrides, plant=plant, script=scripts[name])

    def short(name: str, head: str, ranks: int) -> dict:
        return of(name, f"{name}-{head}-{ranks}", f"model.path={folder / head}", "optimizer.max_steps=2")

    ewc = ("ewc.strength=1", f"ewc.data={folder / 'main.jsonl'}", "ewc.documents=8", "optimizer.max_steps=2")
    stopped = [(name, f"{name}-again") for name in RESUMED] + [(name, f"{name}-alone") for name in MOVED]
    two = [
        run_of(folder, "plain"),
        *(of(name, f"{name}-2") for name in RECIPES),
        *(short(name, "tied", 2) for name in LOSSES),
        of("frozen_layers", "frozen-ewc", *ewc),
        *(of(name, run, plant=f"signal_at_micro_batch:{IN_STEP_4}") for name, run in stopped),
        *(of(name, f"{name}-again") for name in RESUMED),
    ]
    one = [short(name, head, 1) for name in LOSSES for head in ("tied", "untied")]
    launch(folder, "two", 2, two)
    launch(folder, "one", 1, [*one, *(of(name, f"{name}-alone") for name in MOVED)])
    return folder / "runs"


def curves(runs: Path, run: str) -> dict[int, dict]:
    """The rows of a run by step: each has a finite loss, by source."""
    found = rows(runs / run)
    for row in found.values():
        assert all(math.isfinite(row[f"train/loss{source}"]) for source in ("", "/main", "/other"))
        assert row["train/loss/main"] > 0 and row["train/loss/other"] > 0
    return found


def took_effect(folder: Path, name: str, found: dict[int, dict], plain: dict[int, dict]) -> bool:
    """Whether a recipe did what its name says."""
    base = load_file(folder / "untied" / "model.safetensors")
    ours, theirs = (weights(folder / "runs" / run) for run in (f"{name}-2", "plain"))
    first = found[1]["train/loss"] - plain[1]["train/loss"]
    frozen = [n for n in base if ".layers.0." in n]
    return {
        "z_loss": 0 < first < 0.1,
        "label_smoothing": abs(first) > 1e-3,
        "dft": first < -0.5,
        "sgd": abs(first) < 1e-5 and largest_difference(ours, theirs) > 1e-4,
        "nadam": abs(first) < 1e-5 and largest_difference(ours, theirs) > 1e-4,
        "wsd": [found[n]["train/learning_rate"] for n in (1, 5, 6)] == pytest.approx([1e-3, 1e-3, 1e-4]),
        "l2_to_start": found[1]["train/grad_norm"] == pytest.approx(plain[1]["train/grad_norm"])
        and found[6]["train/grad_norm"] != plain[6]["train/grad_norm"],
        "ema": largest_difference(ours, base) < 0.2 * largest_difference(theirs, base),
        "frozen_layers": bool(frozen)
        and all(torch.equal(ours[n], base[n]) for n in frozen)
        and largest_difference(ours, base) > 1e-3,
        "weight_norm_curve": found[6].get("train/weight_norm") == pytest.approx(norm_of(theirs), rel=1e-2),
    }[name]


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors.values()))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(folder, runs, name) -> None:
    found = curves(runs, f"{name}-2")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert took_effect(folder, name, found, curves(runs, "plain"))
    if name in LOSSES:
        untied, tied, other = (curves(runs, f"{name}-{run}") for run in ("untied-1", "tied-1", "tied-2"))
        assert untied[1]["train/loss"] == pytest.approx(found[1]["train/loss"], rel=1e-6)
        assert tied[1]["train/loss"] == pytest.approx(other[1]["train/loss"], rel=1e-6) != untied[1]["train/loss"]


def starts(run: Path) -> list[int]:
    """The step at which each start of a run began."""
    return [entry.step for entry in Record(run).read() if entry.kind == "start"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_recipe_resumes(runs, name) -> None:
    """Stopped in step 4 and continued, it has each step once and the weights of a run that was not stopped."""
    assert starts(runs / f"{name}-again") == [0, 3]
    assert sorted(curves(runs, f"{name}-again")) == list(range(1, STEPS + 1))
    assert largest_difference(weights(runs / f"{name}-again"), weights(runs / f"{name}-2")) == 0.0
    if name in MOVED:
        assert starts(runs / f"{name}-alone") == [0, 3]
        assert 0 < largest_difference(weights(runs / f"{name}-alone"), weights(runs / f"{name}-2")) < 1e-5


def test_the_export_of_an_average_is_said(folder, runs) -> None:
    said = (folder / "two.out").read_text()
    assert "the export holds the average of the weights, and not the last ones" in said


def test_ewc_pulls_no_frozen_layer(runs) -> None:
    row = curves(runs, "frozen-ewc")[2]
    assert row["ewc/penalty"] > 0 and "ewc/penalty/layers.01" in row and "ewc/penalty/layers.00" not in row


@pytest.fixture(scope="module")
def checked(folder, scripts) -> dict[str, dict]:
    """Recipe -> the report of scripts/check.py, all in one launch of one rank."""
    out = folder / "checked"
    out.mkdir()
    config = str(folder / "config.py")
    checks = [["--train", str(scripts[name]), config, "--json", str(out / f"{name}.json")] for name in CHECKED]
    (out / "plan.json").write_text(json.dumps({"config": config, "checks": checks, "parts": []}))
    done = run_ranks(1, ROOT / "tests" / "tools" / "check_worker.py", out / "plan.json", PYTHONPATH=str(ROOT))
    assert done.stdout.count("exit code") == len(CHECKED), (done.stdout + done.stderr)[-3000:]
    return {name: json.loads((out / f"{name}.json").read_text()) for name in CHECKED}


@pytest.mark.parametrize("name", CHECKED)
def test_the_check_of_a_recipe_runs(checked, name) -> None:
    found = {result["name"]: result for result in checked[name]["results"]}
    wrong = {key: result["text"] for key, result in found.items() if result["status"] == "fails"}
    # What is exported of the average is not the last checkpoint, and the check says so.
    assert set(wrong) == ({"export"} if name == "ema" else set()), wrong
    assert found["kill and resume"]["figures"]["relative"] == 0.0 and found["loss"]["status"] == "ok"
    expected = "skipped" if name in ("sgd", "frozen_layers") else "ok"
    assert found["gradient"]["status"] == expected, found["gradient"]["text"]


def test_every_recipe_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"`{name}`" not in readme] == []
