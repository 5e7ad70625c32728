"""The recipes of README's "Edit the loop": each patch applies to train.py, and the edited loop trains, logs and resumes.

Recipes with distinguishable effects share a copy of train.py, which trains on two ranks with an untied head. Recipes that keep a
state of their own lose their last checkpoint and continue: what they save then is what they had saved. The check (`--check`) runs
on a copy with recipes of all kinds.
"""

import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts.verify.files import check_files, read_record
from tests.distributed.launch import largest_difference, launch, rows, run_of, weights
from tests.processes import ROOT, run_ranks
from tests.scripts.check.faults import END
from tests.tiny import write_chat_file, write_tiny_model
from training.checkpointer import Record

RECIPES = {patch.stem: patch for patch in sorted((ROOT / "docs" / "recipes").glob("*.patch"))}
# Name of a run -> the recipes that it has together.
GROUPS = {
    "z_loss": ("z_loss", "wsd", "weight_norm_curve"),
    "label_smoothing": ("label_smoothing", "frozen_layers"),
    "dft": ("dft", "ema"),
    "sgd": ("sgd",),
    "nadam": ("nadam",),
    "muon": ("muon",),
    "l2_to_start": ("l2_to_start",),
}
RUN_OF = {recipe: run for run, recipes in GROUPS.items() for recipe in recipes}
RESUMED = ("label_smoothing", "dft", "l2_to_start", "muon")
HALF = ("lr=settings.learning_rate", "lr=0.5 * settings.learning_rate")  # of make_optimizer
CHECKED = ("dft", "sgd", "wsd", "ema", "frozen_layers")
STEPS = 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_tiny_model(folder / "model", tied=False)
    for name in ("main", "other"):
        write_chat_file(folder / f"{name}.jsonl", 24, seed=len(name))
    (folder / "config.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(folder / "model")!r}, compute_dtype="fp32"),
    data=Data(
        ({str(folder / "main.jsonl")!r},), mix=(Source("other", ({str(folder / "other.jsonl")!r},), 0.3),),
        sequence_length=256, cache=None,
    ),
    batch=Batch(global_examples=8, micro_batch=2),
    optimizer=Optimizer(1e-3, epochs=2, max_steps={STEPS}, warmup_steps=0),
    run=Run("base", directory={str(folder / "runs")!r}, save_every={STEPS // 2}, keep_last=2, log_to=()),
)
""")
    return folder


def edited(folder: Path, *recipes: str, change: tuple[str, str] = ("", "")) -> Path:
    """A copy of train.py with the recipes applied, and then the text `change[0]` replaced."""
    tree = folder / "scripts" / "-".join((*recipes, *filter(None, change[:1])))
    tree.mkdir(parents=True)
    script = tree / "train.py"
    text = (ROOT / "train.py").read_text()
    for name in recipes:
        script.write_text(text)
        subprocess.run(["git", "apply", str(RECIPES[name])], cwd=tree, check=True, capture_output=True)
        assert script.read_text() != text
        text = script.read_text()
    text = text.replace(*change, 1)
    body, main, last = text.rpartition('if __name__ == "__main__":\n')
    assert END.endswith(main)
    script.write_text(body + END + last)
    return script


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    """All runs, in one launch of two ranks; `plain` is the loop as it is."""
    scripts = {run: edited(folder, *recipes) for run, recipes in GROUPS.items()}
    ewc = ("ewc.strength=1", f"ewc.data={folder / 'main.jsonl'}", "ewc.documents=8")
    more = {run: ewc if run == "label_smoothing" else () for run in GROUPS}
    lost = {run: str(folder / "runs" / run / "checkpoints" / f"step-{STEPS:06d}" / "manifest.json") for run in RESUMED}
    all_runs = [
        run_of(folder, "plain"),
        *(run_of(folder, run, *more[run], script=scripts[run]) for run in GROUPS),
        run_of(folder, "half", "optimizer.learning_rate=5e-4", script=scripts["sgd"]),
        run_of(folder, "half_of_group", script=edited(folder, "sgd", change=HALF)),
        *(
            run_of(
                folder,
                run,
                *more[run],
                "run.resume=previous",
                plant=f"first:Path({lost[run]!r}).unlink()",
                script=scripts[run],
            )
            for run in RESUMED
        ),
    ]
    launch(folder, "two", 2, all_runs)
    return folder / "runs"


def curves(run: Path) -> dict[int, dict]:
    """The rows of a run by step: each has a finite loss, by source."""
    rows_by_step = rows(run)
    for row in rows_by_step.values():
        assert all(math.isfinite(row[f"train/loss{source}"]) for source in ("", "/main", "/other"))
        assert row["train/loss/main"] > 0 and row["train/loss/other"] > 0
    return rows_by_step


def took_effect(folder: Path, name: str, rows_by_step: dict[int, dict], plain: dict[int, dict]) -> bool:
    """Return whether a recipe had its effect."""
    base = load_file(folder / "model" / "model.safetensors")
    ours, theirs = (weights(folder / "runs" / run) for run in (RUN_OF[name], "plain"))
    first = rows_by_step[1]["train/loss"] - plain[1]["train/loss"]
    frozen = [n for n in base if ".layers.0." in n]
    return {
        "z_loss": 0 < first < 0.1,
        "label_smoothing": abs(first) > 1e-3,
        "dft": first < -0.5,
        "sgd": abs(first) < 1e-5 and largest_difference(ours, theirs) > 1e-4,
        "nadam": abs(first) < 1e-5 and largest_difference(ours, theirs) > 1e-4,
        "muon": abs(first) < 1e-5 and evenness(ours, base) > 0.3 > 3 * evenness(theirs, base),
        "wsd": [rows_by_step[n]["train/learning_rate"] for n in (1, 3, 4)] == pytest.approx([1e-3, 1e-3, 1e-4]),
        "l2_to_start": rows_by_step[1]["train/grad_norm"] == pytest.approx(plain[1]["train/grad_norm"])
        and rows_by_step[STEPS]["train/grad_norm"] != plain[STEPS]["train/grad_norm"],
        "ema": largest_difference(ours, base) < 0.2 * largest_difference(theirs, base),
        "frozen_layers": bool(frozen)
        and all(torch.equal(ours[n], base[n]) for n in frozen)
        and largest_difference(ours, base) > 1e-3,
        "weight_norm_curve": rows_by_step[STEPS].get("train/weight_norm") == pytest.approx(norm_of(ours), rel=1e-2),
    }[name]


def evenness(tensors: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> float:
    """How alike the singular values of a matrix's change are: 1 if all are equal, which a step of Muon comes near to."""
    name = "model.layers.0.self_attn.q_proj.weight"
    values = torch.linalg.svdvals((tensors[name] - base[name]).double())
    return (values.square().mean() / values[0] ** 2).item()


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors.values()))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(folder, runs, name) -> None:
    subprocess.run(["git", "apply", "--check", str(RECIPES[name])], cwd=ROOT, check=True)  # alone
    rows_by_step, plain = curves(runs / RUN_OF[name]), curves(runs / "plain")
    assert sorted(rows_by_step) == list(range(1, STEPS + 1))
    assert took_effect(folder, name, rows_by_step, plain)
    output = (folder / "two.out").read_text()
    assert "the export holds the average of the weights, and not the last ones" in output


@pytest.mark.parametrize("name", RESUMED)
def test_a_recipe_resumes(runs, name) -> None:
    """A run continued from half of its steps saves the same bits as before: weights, optimizer and registered objects."""
    entries = Record(runs / name).read()
    assert [entry.step for entry in entries if entry.kind == "start"] == [0, STEPS // 2]
    first, second = [
        entry.content["tensors"] for entry in entries if entry.kind == "checkpoint" and entry.step == STEPS
    ]
    assert first == second


def test_group_keeps_its_rate_of_make_optimizer(folder, runs) -> None:
    """Half of it in make_optimizer is, to the bit, half of it in the config, which the curve shows."""
    assert largest_difference(weights(runs / "half"), weights(runs / "half_of_group")) == 0
    assert largest_difference(weights(runs / "half"), weights(runs / "sgd")) > 0
    assert rows(runs / "half_of_group")[1]["train/learning_rate"] == rows(runs / "sgd")[1]["train/learning_rate"]
    warning = "make_optimizer has groups with a peak rate of 0.0005, and they are trained with it"
    assert warning in (folder / "two.out").read_text()


def test_an_average_that_is_exported_verifies(runs) -> None:
    lines = list(check_files(runs / RUN_OF["ema"], read_record(runs / RUN_OF["ema"]), None))
    assert "the last weights of step 4, equal to registered.average of their checkpoint" in lines[-1]


def test_an_average_of_weights_in_bf16_moves(tmp_path) -> None:
    """A hundredth of a change is below the last digit of bf16, in which the average would never move."""
    text, names = edited(tmp_path, "ema").read_text(), {"torch": torch}
    exec(text[text.index("class Average") : text.index("def validate(")], names)
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average = names["Average"]({"weight": weight})
    weight.data.fill_(1.5)
    for _ in range(100):
        average.update(0.99)
    assert average.state_dict()["weight"].tolist() == pytest.approx([1.5 - 0.5 * 0.99**100] * 3)
    average.copy_to_parameters()
    assert weight.dtype == torch.bfloat16 and weight.tolist() == pytest.approx([1.32] * 3, rel=1e-2)


def test_ewc_pulls_no_frozen_layer(runs) -> None:
    row = curves(runs / "label_smoothing")[STEPS]
    assert row["ewc/penalty"] > 0 and "ewc/penalty/layers.01" in row and "ewc/penalty/layers.00" not in row


def test_the_check_of_a_recipe_runs(folder) -> None:
    """scripts/check.py, on one rank."""
    config, out = str(folder / "config.py"), folder / "check.json"
    checks = [["--train", str(edited(folder, *CHECKED)), config, "--json", str(out)]]
    (folder / "plan.json").write_text(json.dumps({"config": config, "checks": checks, "parts": []}))
    done = run_ranks(
        1, ROOT / "tests" / "scripts" / "check" / "check_worker.py", folder / "plan.json", PYTHONPATH=str(ROOT)
    )
    assert done.stdout.count("exit code") == 1, (done.stdout + done.stderr)[-3000:]
    results = {result["name"]: result for result in json.loads(out.read_text())["results"]}
    wrong = {key: result["text"] for key, result in results.items() if result["status"] == "fails"}
    assert set(wrong) == {"export"}, wrong  # the average, and not the last checkpoint
    assert "to the bit" in results["kill and resume"]["text"] and results["loss"]["status"] == "ok"
    assert results["gradient"]["status"] == "skipped", results["gradient"]["text"]  # of layers that are not all trained


def test_every_recipe_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in RECIPES if f"`{name}`" not in readme] == [] and set(RUN_OF) == set(RECIPES)
