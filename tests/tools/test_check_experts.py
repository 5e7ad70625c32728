"""The check of whole runs with experts, with and without the routers' auxiliary loss, on one rank and on two."""

import json

import pytest

from tests.processes import ROOT, run_ranks
from tests.tiny import write_chat_file, write_tiny_model
from tests.tools.test_check import WORKER
from tools.check_data import OK, SKIPPED

pytestmark = pytest.mark.slow
# Name -> (family, overrides).
RUNS = {
    "qwen3_moe": ("qwen3_moe", ("model.router_aux=0.1",)),
    "gpt_oss": ("gpt_oss", ("model.compute_dtype=bf16",)),
    "gpt_oss-aux": ("gpt_oss", ("model.router_aux=0.1", "model.compute_dtype=bf16")),
    "qwen3_moe-plain": ("qwen3_moe", ("sharding.context=2",)),
}
OF_RANKS = {1: ("qwen3_moe", "gpt_oss"), 2: ("gpt_oss-aux", "qwen3_moe-plain")}


@pytest.mark.parametrize("ranks", OF_RANKS)
def test_every_line_is_good_or_says_why_it_is_not_known(tmp_path, ranks) -> None:
    write_chat_file(tmp_path / "train.jsonl", 24)
    write_chat_file(tmp_path / "validation.jsonl", 6, seed=1)
    checks = []
    for name in OF_RANKS[ranks]:
        family, overrides = RUNS[name]
        write_tiny_model(tmp_path / name, family, tied=False)
        (tmp_path / f"{name}.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(tmp_path / name)!r}, compute_dtype="fp32"),
    data=Data(
        ({str(tmp_path / "train.jsonl")!r},), ({str(tmp_path / "validation.jsonl")!r},), sequence_length=256, cache=None
    ),
    batch=Batch(global_examples=6, micro_batch=1),
    optimizer=Optimizer(1e-3, epochs=1),
    run=Run({name!r}, directory={str(tmp_path / "runs")!r}, keep_last=1),
)
""")
        files = [str(tmp_path / f"{name}.py"), *overrides, "--json", str(tmp_path / f"{name}.json")]
        checks.append(["--train", str(ROOT / "train.py"), *files])
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"config": checks[0][2], "checks": checks, "parts": []}))
    done = run_ranks(ranks, WORKER, plan, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    for name in OF_RANKS[ranks]:
        report = json.loads((tmp_path / f"{name}.json").read_text())
        found = {result["name"]: (result["status"], result["text"]) for result in report["results"]}
        skipped = {line: text for line, (status, text) in found.items() if status == SKIPPED}
        assert {line: one for line, one in found.items() if one[0] != OK and line not in skipped} == {}, done.stdout
        has_loss_of_routers = "model.router_aux=0.1" in RUNS[name][1]
        expected = {"other ranks"} if ranks == 1 or has_loss_of_routers else set()
        expected |= {"gradient norm", "gradient"} if has_loss_of_routers else set()
        assert skipped.keys() == expected, skipped
        assert (
            report["exit_code"] == 0 and {"isolation", "loss", "updates", "kill and resume", "export"} <= found.keys()
        )
        if has_loss_of_routers:
            assert "the reference knows no auxiliary loss of the routers" in skipped["gradient"]
