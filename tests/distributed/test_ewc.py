"""train.py with EWC on 1 and 2 gloo processes: the Fisher diagonal and the penalty's gradient, sharding, stop and resume.

A run saves its Fisher diagonal and reference in runs/NAME/ewc. The plant `note_penalty` writes the whole weights and their
gradients before and after the penalty in step 2, in which the weights have moved. tests/model/ewc/test_fisher.py compares the
estimate with its definition.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launch import largest_difference, launch, rows, run_of, weights, workplace
from tests.tiny import write_chat_file

STRENGTH = 100.0
NOTED = ("r1", "r2", "r2-none", "r2-grad-op", "r2-reused", "r1-bf16", "r2-bf16")
BF16 = ("optimizer.memory=12N", "ewc.dtype=bf16", "optimizer.max_steps=2")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write an untied model with biases and 391 rows, an odd number. test_survival.py has EWC on a tied model."""
    more = f'ewc=EWC(strength={STRENGTH}, data=(here + "/old.jsonl",), documents=8),'
    folder = workplace(
        tmp_path_factory.mktemp("ewc"),
        10,
        model={"family": "qwen2", "tied": False, "vocab_size": 391, "layers": 1},
        rate=2e-3,
        optimizer="epochs=1, max_grad_norm=1.0",
        run="save_every=2",
        more=more,
    )
    write_chat_file(folder / "old.jsonl", 12, seed=5)
    # The same weights with other RoPE frequencies, which only config.json contains.
    shutil.copytree(folder / "model", folder / "other_rope")
    config = json.loads((folder / "other_rope" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (folder / "other_rope" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    def run(name: str, *overrides: str, **options) -> dict:
        plant = "note_penalty" if name in NOTED else None
        return run_of(folder, name, *overrides, **{"plant": plant} | options)

    validated = ("run.eval_general=True", f"data.validation={folder / 'old.jsonl'}")
    on_one_rank = [
        run("r1", *validated),
        run("r1-bf16", *BF16),
    ]
    launch(folder, "one", 1, on_one_rank)
    on_two_ranks = [
        run("r2", *validated),
        # grad_op leaves the parameters gathered after an evaluation. Here an evaluation runs before each step.
        run("r2-grad-op", *validated[1:], "sharding.strategy=grad_op", "run.eval_every=1"),
        run("r2-none", "sharding.strategy=none", "data.packing=True", "run.stop_at=2"),
        run("r2-reused", "ewc.data=", f"ewc.fisher={folder}/runs/r1/ewc"),  # saved by 1 rank
        run("r2-bf16", *BF16),
        run("r2-zero", "ewc.strength=0", "ewc.data=missing.jsonl"),  # the data is not read
        # The estimate takes 4 forwards, then each step takes 2.
        run("stopped", plant="signal_at_micro_batch:7"),
        run("stopped-early", plant="signal_at_micro_batch:2"),
        run("stopped", "ewc.strength=50", expect=2),
        run("stopped", f"model.path={folder / 'other_rope'}", expect=2),
        run("stopped", "run.eval_general=True"),  # the base is model.path, not the checkpoint
        run("stopped-early", plant=f"first:assert not Path('{folder}/runs/stopped-early/ewc').exists()"),
    ]
    output = launch(folder, "two", 2, on_two_ranks)
    assert "ewc.strength=100.0, now it is 50.0" in output
    rope = r"was made with rope_parameters of config.json=.*'rope_theta': 10000.*now it is .*20000"
    assert re.search(rope, output)
    return folder / "runs"


def anchor(run: Path, kind: str) -> dict[str, torch.Tensor]:
    """Return the Fisher diagonal or the reference of a run."""
    return {name: tensor.double() for name, tensor in load_file(run / "ewc" / f"{kind}-00001.safetensors").items()}


def noted(runs: Path, name: str, kind: str) -> dict[str, torch.Tensor]:
    tensors = load_file(runs.parent / f"{name}.penalty.safetensors")
    return {key.removeprefix(f"{kind}."): t.double() for key, t in tensors.items() if key.startswith(f"{kind}.")}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest relative difference in norm over all tensors."""
    assert a.keys() == b.keys() and len(a) > 10
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


def squares(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors.values())


@pytest.mark.parametrize(
    "name, reference",
    [
        ("r2", "r1"),
        ("r2-none", "r1"),  # packed
        ("r2-grad-op", "r1"),
    ],
)
def test_fisher_is_independent_of_ranks_and_packing(runs, name, reference) -> None:
    assert difference(anchor(runs / name, "fisher"), anchor(runs / reference, "fisher")) < 1e-6


@pytest.mark.parametrize("name", NOTED)
def test_gradient_is_lambda_times_fisher_times_drift(runs, name) -> None:
    fisher, reference = (anchor(runs / name, kind) for kind in ("fisher", "reference"))
    weight, plain, total = (noted(runs, name, kind) for kind in ("weight", "plain", "total"))
    drift = {n: weight[n] - reference[n] for n in weight}
    pull = {n: STRENGTH * fisher[n] * drift[n] for n in weight}
    expected = {n: plain[n] + pull[n] for n in weight}
    if name.endswith("bf16"):  # a gradient is rounded, up or down
        assert all(((total[n] - e).abs() <= 2**-7 * e.abs() + 1e-30).all() for n, e in expected.items())
        return
    assert min(float(pull[n].norm() / plain[n].norm()) for n in pull) > 1e-4  # large enough to be visible
    assert difference(total, expected) < 1e-6
    row = rows(runs / name)[2]
    assert row["ewc/penalty"] == pytest.approx(sum(float((pull[n] * drift[n]).sum()) for n in pull) / 2)
    for curve, tensors in {"ewc/grad_norm": pull, "ewc/drift": drift, "train/grad_norm": total}.items():
        assert row[curve] == pytest.approx(squares(tensors) ** 0.5)


def test_bf16_gradients_match_one_rank_up_to_rounding(runs) -> None:
    assert difference(anchor(runs / "r2-bf16", "fisher"), anchor(runs / "r1-bf16", "fisher")) < 2e-2


def test_saved_fisher_is_not_estimated_again(folder, runs) -> None:
    output = (folder / "two.out").read_text()
    assert f"read from {runs}/stopped/ewc" in output and f"reference reused from {runs}/r1/ewc" in output
    files = ["fisher-00001.safetensors", "reference-00001.safetensors", "settings.json"]
    assert sorted(path.name for path in (runs / "r2-reused" / "ewc").iterdir()) == files


def test_update_is_independent_of_sharding_and_stops(runs) -> None:
    right = weights(runs / "r2")
    for name, limit in {
        "r1": 1e-5,
        "r2-grad-op": 1e-6,
        "r2-reused": 1e-5,
        "stopped": 0.0,
        "stopped-early": 0.0,
    }.items():
        assert largest_difference(right, weights(runs / name)) <= limit, name
    assert largest_difference(right, weights(runs / "r2-zero")) > 1e-3


def test_curves(runs) -> None:
    ours, zero = rows(runs / "r2"), rows(runs / "r2-zero")
    assert ours[1]["ewc/penalty"] == 0.0 and ours[3]["ewc/penalty"] > ours[2]["ewc/penalty"] > 0.0
    assert ours[1]["train/loss"] == zero[1]["train/loss"]  # without the penalty
    for key in ("penalty", "grad_norm", "drift"):
        for layer in ("", "/layers.00", "/embed_tokens", "/norm"):
            assert f"ewc/{key}{layer}" in ours[3]
    of_layers = [value for key, value in ours[3].items() if key.startswith("ewc/penalty/")]
    assert sum(of_layers) == pytest.approx(ours[3]["ewc/penalty"])
    assert not any(key.startswith("ewc/") for row in zero.values() for key in row)
    assert not (runs / "r2-zero" / "ewc").exists()
    assert json.loads((runs / "r2" / "ewc" / "settings.json").read_text())["made"]["estimator"] == "model"


def test_forgetting_is_measured_against_base_after_resume(runs) -> None:
    before, *_, after = rows(runs / "r2", "forgetting/kl").values()
    assert before["step"] == 0 and before["forgetting/kl"] < 1e-5 and before["forgetting/agreement"] == 1.0
    assert after["step"] == 3 and after["forgetting/kl"] > 1e-2 and after["forgetting/agreement"] < 1.0
    assert after.pop("forgetting/task_kl") > 1e-2  # on the prompts of data.validation; the stopped run has none
    assert rows(runs / "stopped", "forgetting/kl")[3] == after
    alone = rows(runs / "r1", "forgetting/kl")[3]
    for key in ("forgetting/kl", "forgetting/perplexity_per_byte"):
        assert alone[key] == pytest.approx(after[key], rel=1e-4)
