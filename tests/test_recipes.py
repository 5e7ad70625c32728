"""The recipes of README's "Edit the loop": each patch applies to train.py, and the edited loop trains, logs and resumes.

An edited copy of train.py runs beside the project's modules. Every recipe trains on two ranks with an untied head; the losses
also on one rank and with a tied one. Recipes that keep a state of their own are continued from the checkpoint of half of their
steps, on the same number of ranks, and end with the weights of a run that was not stopped; an optimizer also on another number.
The check of each (`--check`) starts it, kills it and resumes it.
"""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import ENVIRONMENT, largest_difference, rows, weights
from tests.processes import ROOT, run_ranks
from tests.tiny import write_chat_file, write_tiny_model
from tests.tools.check_faults import END

RECIPES = {patch.stem: patch for patch in sorted((ROOT / "docs" / "recipes").glob("*.patch"))}
LOSSES = ("z_loss", "label_smoothing", "dft")
RESUMED = ("sgd", "nadam", "ema", "l2_to_start", "frozen_layers")
STEPS = 6
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


def edited(tmp_path: Path, name: str, end: str = "") -> Path:
    """A copy of train.py with the recipe applied, beside links to everything else."""
    tree = tmp_path / name
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("train.py", ".git"):
            (tree / path.name).symlink_to(path)
    (tree / "train.py").write_text((ROOT / "train.py").read_text())
    subprocess.run(["git", "apply", str(RECIPES[name])], cwd=tree, check=True, capture_output=True)
    text = (tree / "train.py").read_text()
    assert text != (ROOT / "train.py").read_text()
    body, main, last = text.rpartition('if __name__ == "__main__":\n')
    (tree / "train.py").write_text(body + (end or main) + last)
    return tree / "train.py"


def train(folder: Path, script: Path, ranks: int, run: str, *overrides: str) -> dict[int, dict]:
    done = run_ranks(ranks, script, folder / "config.py", f"run.name={run}", *overrides, **ENVIRONMENT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (folder / f"{run}.out").write_text(done.stdout)
    found = rows(folder / "runs" / run)
    for row in found.values():
        assert all(math.isfinite(row[f"train/loss{source}"]) for source in ("", "/main", "/other"))
        assert row["train/loss/main"] > 0 and row["train/loss/other"] > 0
    return found


@pytest.fixture(scope="module")
def plain(folder) -> dict[int, dict]:
    """The rows of the loop as it is."""
    return train(folder, ROOT / "train.py", 2, "plain")


def took_effect(folder: Path, name: str, found: dict[int, dict], plain: dict[int, dict]) -> bool:
    """Whether a recipe did what its name says."""
    base, ours, theirs = (
        load_file(folder / "untied" / "model.safetensors"),
        *(weights(folder / "runs" / run) for run in (f"{name}-2", "plain")),
    )
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
def test_a_recipe_trains(folder, tmp_path, plain, name) -> None:
    script = edited(tmp_path, name)
    found = train(folder, script, 2, f"{name}-2")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert took_effect(folder, name, found, plain)
    if name == "ema":
        said = (folder / "ema-2.out").read_text()
        assert "the export holds the average of the weights, and not the last ones" in said
    if name in LOSSES:
        losses = {}
        for ranks, head in ((1, "untied"), (1, "tied"), (2, "tied")):
            short = (f"model.path={folder / head}", "optimizer.max_steps=2")
            losses[ranks, head] = train(folder, script, ranks, f"{name}-{head}-{ranks}", *short)[1]["train/loss"]
        assert losses[1, "untied"] == pytest.approx(found[1]["train/loss"], rel=1e-6)
        assert losses[1, "tied"] == pytest.approx(losses[2, "tied"], rel=1e-6) != losses[1, "untied"]
    if name in RESUMED:  # from the checkpoint of step 3
        run = folder / "runs" / f"{name}-again"
        shutil.copytree(folder / "runs" / f"{name}-2", run)
        shutil.rmtree(run / "export")
        shutil.rmtree(run / "checkpoints" / "step-000006")
        (run / "checkpoints" / "latest").write_text("step-000003")
        alone = shutil.copytree(run, folder / "runs" / f"{name}-alone")
        train(folder, script, 2, run.name)
        assert largest_difference(weights(run), weights(folder / "runs" / f"{name}-2")) == 0.0
        if name == "nadam":
            train(folder, script, 1, alone.name)
            assert 0 < largest_difference(weights(alone), weights(run)) < 1e-5
    if name == "frozen_layers":
        ewc = ("ewc.strength=1", f"ewc.data={folder / 'main.jsonl'}", "ewc.documents=8", "optimizer.max_steps=2")
        rows = train(folder, script, 2, "frozen-ewc", *ewc)
        assert (
            rows[2]["ewc/penalty"] > 0 and "ewc/penalty/layers.01" in rows[2] and "ewc/penalty/layers.00" not in rows[2]
        )


@pytest.fixture(scope="module")
def checked(folder, tmp_path_factory) -> dict[str, dict]:
    """Recipe -> the report of scripts/check.py, all in one launch of one rank."""
    out = tmp_path_factory.mktemp("checked")
    config = str(folder / "config.py")
    scripts = {name: edited(out, name, END) for name in RECIPES}
    checks = [["--train", str(path), config, "--json", str(out / f"{name}.json")] for name, path in scripts.items()]
    (out / "plan.json").write_text(json.dumps({"config": config, "checks": checks, "parts": []}))
    done = run_ranks(1, ROOT / "tests" / "tools" / "check_worker.py", out / "plan.json", PYTHONPATH=str(ROOT))
    assert done.stdout.count("exit code") == len(RECIPES), (done.stdout + done.stderr)[-3000:]
    return {name: json.loads((out / f"{name}.json").read_text()) for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_the_check_of_a_recipe_runs(checked, name) -> None:
    found = {result["name"]: result for result in checked[name]["results"]}
    wrong = {key: result["text"] for key, result in found.items() if result["status"] == "fails"}
    # What is exported of the average is not the last checkpoint, and the check says so.
    assert set(wrong) == ({"export"} if name == "ema" else set()), wrong
    assert found["kill and resume"]["figures"]["relative"] == 0.0 and found["loss"]["status"] == "ok"
    expected = "skipped" if name in ("sgd", "nadam", "frozen_layers") else "ok"
    assert found["gradient"]["status"] == expected, found["gradient"]["text"]


def test_every_recipe_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"`{name}`" not in readme] == []
