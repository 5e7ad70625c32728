"""The check of whole runs with experts, with and without the routers' auxiliary loss, on one rank and on two."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import tools.check
from tests.distributed.launch import workplace
from tests.processes import ROOT, run_ranks
from tests.tools.check_faults import write_train
from tests.tools.test_check import WORKER, reference
from tools.check_data import OK, SKIPPED, Result
from tools.check_runs import KILLED_AFTER, STEPS

AUXILIARY = "model.router_aux=0.1"


def write_run(folder: Path, family: str) -> Path:
    """A tiny model of `family`, its data and a config in a new folder; returns the config."""
    model = {"family": family, "tied": False}
    return workplace(folder, 24, 6, model, data="", batch="global_examples=6", run="keep_last=1") / "config.py"


def launch(folder: Path, ranks: int, config: Path, overrides: list[str], parts: list[dict]) -> dict[str, dict]:
    """The lines of a check of the whole run by their names. parts: of check_worker.py, as well."""
    report, plan = folder / "report.json", folder / "plan.json"
    command = ["--train", str(write_train(folder)), str(config), *overrides, "--json", str(report)]
    plan.write_text(json.dumps({"config": str(config), "checks": [command], "parts": parts}))
    done = run_ranks(ranks, WORKER, plan, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    written = json.loads(report.read_text())
    assert written["exit_code"] == 0, done.stdout[-5000:]
    lines = {result["name"]: result for result in written["results"]}
    assert {"isolation", "loss", "updates", "kill and resume", "export"} <= lines.keys()
    assert {result["status"] for result in lines.values()} <= {OK, SKIPPED}, done.stdout[-5000:]
    return lines


def skipped(lines: dict[str, dict]) -> set[str]:
    return {name for name, result in lines.items() if result["status"] == SKIPPED}


@pytest.mark.slow
def test_every_line_is_good_or_says_why_it_is_not_known(tmp_path) -> None:
    """With the auxiliary loss; and three steps in bf16 without it, of a family with sinks, whose gradient is known."""
    config, other = (write_run(tmp_path / family, family) for family in ("qwen3_moe", "gpt_oss"))
    bf16 = "model.compute_dtype=bf16"
    part = {"name": "gpt_oss", "do": "straight", "config": str(other), "overrides": [bf16]}
    part |= {"script": str(write_train(tmp_path)), "reference": reference(other.parent, bf16)}
    lines = launch(tmp_path, 1, config, [AUXILIARY], [part])
    assert skipped(lines) == {"other ranks", "gradient norm", "gradient"}
    assert "the reference knows no auxiliary loss of the routers" in lines["gradient"]["text"]
    found = {line["name"]: line for line in json.loads((tmp_path / "plan.results.json").read_text())["gpt_oss"]}
    assert {"loss", "gradient norm", "gradient", "updates", "export"} <= found.keys()
    assert {line["status"] for line in found.values()} == {OK}, found


@pytest.mark.slow
def test_every_line_is_good_on_two_ranks_that_share_tokens(tmp_path) -> None:
    config = write_run(tmp_path / "qwen3_moe", "qwen3_moe")
    assert skipped(launch(tmp_path, 2, config, ["sharding.context=2"], [])) == set()


def test_other_ranks_are_not_compared_with_the_auxiliary_loss(monkeypatch) -> None:
    monkeypatch.setattr(tools.check, "three_steps", lambda *_: ([], {}))
    monkeypatch.setattr(tools.check, "saved_steps", lambda _: [KILLED_AFTER, STEPS])
    monkeypatch.setattr(tools.check, "half_of_ranks", lambda *_: (1, ""))
    monkeypatch.setattr(tools.check, "kill_and_resume", lambda *_: Result("run", "kill and resume", OK, ""))
    check = SimpleNamespace(scratch=Path("none"), ranks=SimpleNamespace(world_size=2), config=None)
    check.on_first, check.remove = lambda look: look(), lambda *_: None
    results, _ = tools.check.run_checks(check, {"router_aux": 0.1})
    assert [(result.name, result.status) for result in results] == [("kill and resume", OK), ("other ranks", SKIPPED)]
    assert "the routers' auxiliary loss counts choices" in results[1].text
