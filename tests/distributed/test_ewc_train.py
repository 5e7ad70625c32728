"""train.py with EWC and the forgetting evaluation on 1 and 2 gloo processes: sharding, stop and resume, and strength 0."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.distributed.launch import largest_difference, launch, rows, run_of, weights, workplace
from tests.tiny import write_chat_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    more = 'ewc=EWC(strength=100.0, data=(here + "/old.jsonl",), documents=8),'
    folder = tmp_path_factory.mktemp("ewc_train")
    workplace(
        folder,
        10,
        model={"layers": 1},
        rate=2e-3,
        optimizer="epochs=1, max_grad_norm=1.0",
        run="save_every=2",
        more=more,
    )
    write_chat_file(folder / "old.jsonl", 12, seed=5)
    # The same weights with other RoPE frequencies, which only config.json shows.
    other_rope = folder / "other_rope"
    shutil.copytree(folder / "model", other_rope)
    config = json.loads((other_rope / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (other_rope / "config.json").write_text(json.dumps(config))

    def run(name: str, *overrides: str, quiet: bool = True, **options) -> dict:
        validated = () if quiet else (f"data.validation={folder / 'old.jsonl'}",)
        return run_of(folder, name, *validated, *overrides, **options)

    plan = [
        run("r2", "run.eval_general=True", quiet=False),
        # grad_op leaves the parameters gathered after an evaluation; here there is one before each step.
        run("r2-grad-op", "sharding.strategy=grad_op", "run.eval_every=1", quiet=False),
        run("r2-zero", "ewc.strength=0", "ewc.data=missing.jsonl"),  # not even its data is read
        # The estimate takes 4 forwards, then each step takes 2.
        run("stopped", plant="signal_at_micro_batch:7"),
        run("stopped-early", plant="signal_at_micro_batch:2"),
        run("stopped", "ewc.strength=50", expect=2),
        run("stopped", "ewc.documents=6", expect=2),
        run("stopped", f"model.path={other_rope}", expect=2),
        run("stopped", "run.eval_general=True"),  # the base is model.path, not the checkpoint
        run("stopped-early", plant=f"first:assert not Path('{folder}/runs/stopped-early/ewc').exists()"),
    ]
    output = launch(folder, "two", 2, plan)
    assert "ewc.strength=100.0, now it is 50.0" in output
    assert re.search(
        r"was made with rope_parameters of config.json=.*'rope_theta': 10000.*now it is .*20000",
        output,
    )
    launch(folder, "one", 1, [run("r1", "run.eval_general=True", quiet=False)])
    return folder / "runs"


def test_the_update_does_not_depend_on_sharding_or_a_stop(runs) -> None:
    right = weights(runs / "r2")
    assert largest_difference(right, weights(runs / "r1")) < 1e-5
    assert largest_difference(right, weights(runs / "r2-grad-op")) < 1e-6
    assert largest_difference(right, weights(runs / "stopped")) == 0.0
    assert largest_difference(right, weights(runs / "stopped-early")) == 0.0
    assert largest_difference(right, weights(runs / "r2-zero")) > 1e-3


def test_curves(runs) -> None:
    ours, zero = rows(runs / "r2"), rows(runs / "r2-zero")
    assert ours[1]["ewc/penalty"] == 0.0 and ours[3]["ewc/penalty"] > ours[2]["ewc/penalty"] > 0.0
    assert ours[1]["train/loss"] == zero[1]["train/loss"]  # without the penalty
    for key in ("penalty", "grad_norm", "drift"):
        for layer in ("", "/layers.00", "/embed_tokens", "/norm"):
            assert f"ewc/{key}{layer}" in ours[3]
    assert not any(key.startswith("ewc/") for row in zero.values() for key in row)
    assert not (runs / "r2-zero" / "ewc").exists()
    assert json.loads((runs / "r2" / "ewc" / "settings.json").read_text())["made"]["estimator"] == "model"


def test_forgetting_is_measured_against_the_base_also_after_a_resume(runs) -> None:
    before, *_, after = rows(runs / "r2", "forgetting/kl").values()
    assert before["step"] == 0 and before["forgetting/kl"] < 1e-5 and before["forgetting/agreement"] == 1.0
    assert after["step"] == 3 and after["forgetting/kl"] > 1e-2 and after["forgetting/agreement"] < 1.0
    assert after.pop("forgetting/task_kl") > 1e-2  # on the prompts of data.validation, which the stopped run has not
    assert rows(runs / "stopped", "forgetting/kl")[3] == after
    alone = rows(runs / "r1", "forgetting/kl")[3]
    for key in ("forgetting/kl", "forgetting/perplexity_per_byte"):
        assert alone[key] == pytest.approx(after[key], rel=1e-4)
