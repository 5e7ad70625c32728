"""EWC on 1 and 2 gloo processes: the Fisher diagonal and the gradient do not depend on how the model is sharded.

Also covered: an evaluation that leaves the parameters gathered, a Fisher diagonal read by another number of ranks, and a
stop by a signal. tests/model/ewc/test_fisher.py compares the estimators with their definitions.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import ENVIRONMENT
from tests.processes import run_ranks
from tests.tiny import write_chat_file, write_tiny_model

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("ewc_worker.py")
EVALUATED = {"strategy": "grad_op", "evaluate_before": True, "evaluate": True, "train": True}
BF16 = {"dtype": "bfloat16", "train": True, "ewc": {"dtype": "bf16", "estimator": "empirical", "strength": 1e4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tied model with an even vocabulary, and an untied one with biases and 391 rows, which do not divide by 2 ranks."""
    folder = tmp_path_factory.mktemp("ewc")
    write_tiny_model(folder / "model")
    write_tiny_model(folder / "odd", family="qwen2", tied=False, vocab_size=391)
    write_chat_file(folder / "old.jsonl", 12, seed=5)
    return folder


def launch(folder: Path, world_size: int, cases: dict[str, dict]) -> Path:
    common = {"model": str(folder / "model"), "data": str(folder / "old.jsonl")}
    plan = folder / f"{world_size}-{next(iter(cases))}.json"
    plan.write_text(json.dumps([common | {"folder": str(folder / name)} | case for name, case in cases.items()]))
    done = run_ranks(world_size, WORKER, plan, **ENVIRONMENT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:-3000]
    return folder


EMPIRICAL = {"ewc": {"estimator": "empirical"}}


@pytest.fixture(scope="module")
def one(folder) -> Path:
    odd = {"model": str(folder / "odd")}
    cases = {
        "r1-model": {"train": True},
        "r1-model-alone": {"packing": False},
        "r1-empirical": EMPIRICAL,
        "r1-odd": odd | {"train": True},
        "r1-bf16": BF16,
    }
    return launch(folder, 1, cases)


@pytest.fixture(scope="module")
def two(folder, one) -> Path:
    """`r2-odd-reused` reads the Fisher diagonal that 1 rank saved, `r2-again` the one of `r2-model`, as a restarted run does."""
    odd = {"model": str(folder / "odd")}
    (folder / "r2-again").mkdir()
    (folder / "r2-again" / "ewc").symlink_to(folder / "r2-model" / "ewc")
    cases = {
        "r2-model": {"train": True},
        "r2-again": {"train": True},
        "r2-empirical-alone": EMPIRICAL | {"packing": False},
        "r2-odd-grad-op": odd | EVALUATED,
        "r2-odd-reused": odd | {"train": True, "ewc": {"data": [], "fisher": str(folder / "r1-odd" / "ewc")}},
        "r2-none": {"strategy": "none", "train": True},
        "r2-offload": odd | {"cpu_offload": True, "train": True},
        "r2-bf16": BF16,
        "r2-mean": {"mean": True},
        "r2-stopped": {"stop_after": 3, "packing": False},
    }
    return launch(folder, 2, cases)


def part(folder: Path, name: str, kind: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / f"{name}.safetensors")
    return {n.removeprefix(f"{kind}."): t.double() for n, t in tensors.items() if n.startswith(f"{kind}.")}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative difference in norm over all tensors."""
    assert a.keys() == b.keys() and len(a) > 10
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b)


@pytest.mark.parametrize(
    "name, reference",
    [
        ("r2-model", "r1-model"),
        ("r1-model-alone", "r1-model"),
        ("r2-empirical-alone", "r1-empirical"),
        ("r2-none", "r1-model"),
        ("r2-odd-grad-op", "r1-odd"),
        ("r2-offload", "r1-odd"),
    ],
)
def test_the_fisher_diagonal_does_not_depend_on_ranks_or_packing(folder, two, name, reference) -> None:
    assert difference(part(folder, name, "fisher"), part(folder, reference, "fisher")) < 1e-6


def test_fsdp_averaging_is_detected(folder, two) -> None:
    wrong, right = part(folder, "r2-mean", "fisher"), part(folder, "r1-model", "fisher")
    assert difference(wrong, right) == pytest.approx(0.75, abs=1e-4)  # squares of halved gradients: a quarter


@pytest.mark.parametrize(
    "name",
    ["r1-model", "r2-model", "r2-none", "r2-odd-grad-op", "r2-offload", "r2-odd-reused", "r2-again"],
)
def test_the_gradient_is_lambda_times_fisher_times_drift(folder, two, name) -> None:
    fisher, reference, weight = (part(folder, name, kind) for kind in ("fisher", "reference", "weight"))
    plain, total = part(folder, name, "plain"), part(folder, name, "grad")
    pull = {n: 20.0 * fisher[n] * (weight[n] - reference[n]) for n in weight}
    assert min(float(p.norm() / plain[n].norm()) for n, p in pull.items()) > 1e-4  # large enough to be visible
    assert difference(total, {n: plain[n] + pull[n] for n in weight}) < 1e-6
    row = json.loads((folder / f"{name}.json").read_text())
    assert row["ewc/penalty"] == pytest.approx(
        sum(float((pull[n] * (weight[n] - reference[n])).sum()) for n in pull) / 2
    )
    assert row["ewc/grad_norm"] == pytest.approx(sum(float(p.square().sum()) for p in pull.values()) ** 0.5)
    assert row["ewc/drift"] == pytest.approx(sum(float((weight[n] - reference[n]).square().sum()) for n in pull) ** 0.5)
    assert row["norm"] == pytest.approx(sum(float(g.square().sum()) for g in total.values()) ** 0.5)


def test_bf16_weights_and_gradients(folder, two) -> None:
    """The rounding noise does not depend on the number of ranks; the order in which gradients are summed does."""
    for name in ("r1-bf16", "r2-bf16"):
        fisher, reference, weight = (part(folder, name, kind) for kind in ("fisher", "reference", "weight"))
        plain, total = part(folder, name, "plain"), part(folder, name, "grad")
        for n in weight:
            expected = plain[n] + 1e4 * fisher[n] * (weight[n] - reference[n])
            assert ((total[n] - expected).abs() <= 2**-7 * expected.abs() + 1e-30).all()
    assert difference(part(folder, "r2-bf16", "fisher"), part(folder, "r1-bf16", "fisher")) < 2e-2


def test_a_saved_fisher_diagonal_is_read_and_not_estimated_again(folder, two) -> None:
    said = {"r2-model": "estimating", "r2-again": "read from", "r2-odd-reused": "reused from"}
    assert all(words in (folder / f"{name}.log").read_text() for name, words in said.items())
    files = ["fisher-00001.safetensors", "reference-00001.safetensors", "settings.json"]
    assert sorted(p.name for p in (folder / "r2-odd-reused" / "ewc").iterdir()) == files


def test_a_signal_stops_all_ranks_and_leaves_no_files(folder, two) -> None:
    assert all((folder / f"r2-stopped.stopped{rank}").exists() for rank in range(2))
    assert not (folder / "r2-stopped" / "ewc").exists()
