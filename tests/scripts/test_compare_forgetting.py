"""The whole comparison on a tiny model: trained, evaluated, started again, and a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import write_chat_file, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
EWC = ["ewc.documents=8", "run.save_every=0", "run.eval_every=0"]


def compare(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/compare_forgetting.py", str(folder / "config.py"), *EWC]
    command += ["--test", folder / "test.jsonl", "--general", folder / "old.jsonl", "--out", folder / "out", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)


def test_trains_evaluates_compares_and_skips_what_is_done(tmp_path):
    write_tiny_model(tmp_path / "model")
    for name, count in (("train", 8), ("test", 6), ("old", 12)):
        write_chat_file(tmp_path / f"{name}.jsonl", count, seed=count)
    (tmp_path / "config.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(tmp_path / "model")!r}, compute_dtype="fp32"),
    data=Data(({str(tmp_path / "train.jsonl")!r},), sequence_length=256),
    batch=Batch(global_examples=4, micro_batch=2),
    optimizer=Optimizer(1e-2, epochs=1),
    run=Run("base"),
)
""")
    listed = compare(tmp_path, "--list")
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == [
        "plain",
        "low-lr",
        "replay-5",
        "replay-25",
        "ewc-1",
        "ewc-10",
        "ewc-100",
        "replay-5-ewc-10",
        "replay-5-ewc-100",
    ]
    fisher = tmp_path / "out" / "ewc-1" / "ewc"
    assert listed.stdout.splitlines()[-1].split()[2:] == ["ewc.strength=100", f"ewc.fisher={fisher}"]
    assert listed.stdout.splitlines()[1].split()[1] == "optimizer.learning_rate=0.00333333"

    refused = compare(tmp_path, "--only", "plain", "lora")
    assert refused.returncode == 2 and "--only lora: the methods are plain, low-lr" in refused.stderr

    for options, words in (
        (["--shares", "1.5"], "share"),
        (["--strengths", "-1"], "a strength of EWC must be above 0, not -1"),
        (["--only", "ewc-10"], "ewc-10 takes the Fisher diagonal of ewc-1, which has not run"),
        (["--general", tmp_path / "no.jsonl"], "no.jsonl does not exist"),
        (["--out", tmp_path / "test.jsonl" / "out"], "cannot be written: Not a directory"),
    ):
        refused = compare(tmp_path, *options)
        assert refused.returncode == 2 and words in refused.stderr, refused.stdout + refused.stderr
    assert not (tmp_path / "out").exists()

    # The strength is given so that the held weights show on a model that knows nothing.
    done = compare(tmp_path, "--strengths", "1e6", "--only", "plain", "ewc-1e+06")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["base", "plain", "ewc-1e+06"]
    assert done.stdout.count("== train.py") == 2
    kl = [json.loads((tmp_path / "out" / "results" / f"{name}-general.json").read_text())["kl"]["value"] for name in ("plain", "ewc-1e+06")]  # fmt: skip
    assert 0 < kl[1] < 0.7 * kl[0]  # measured: 0.60 of it
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000

    before = (tmp_path / "out" / "plain" / "export" / "model.safetensors").stat().st_mtime_ns
    again = compare(tmp_path, "--strengths", "1e6", "--only", "plain")
    assert again.returncode == 0 and "already finished: 2 steps" in again.stdout
    assert "== scripts/evaluate" not in again.stdout  # every result is there
    assert (tmp_path / "out" / "plain" / "export" / "model.safetensors").stat().st_mtime_ns == before
    assert again.stdout.split("\n\n")[-2] == done.stdout.split("\n\n")[-2]

    write_chat_file(tmp_path / "test.jsonl", 6, seed=99)
    other = compare(tmp_path, "--strengths", "1e6", "--only", "plain")
    assert other.returncode == 2 and "base-task.json is of other examples than" in other.stderr
