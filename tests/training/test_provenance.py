"""Every start is recorded, also without a commit or without git."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.sha256 import sha256
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.sources import Corpus
from distributed.process_group import Ranks
from training import provenance
from training.checkpointer import Record, RunRecord
from training.identity import fingerprint
from training.provenance import devices, git_state, record_start, short_commit, without_secrets


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init")
    (root / "letter.txt").write_text("plain\n")
    (root / ".gitignore").write_text("ignored\n")
    git(root, "add", ".")
    git(root, "commit", "-m", "first")
    return root


def test_missing_checkout_commit_and_git_are_reported(checkout, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    outside = tmp_path / "outside"
    outside.mkdir()
    assert short_commit(git_state(outside)).startswith("unknown (git: fatal: not a git repository")
    git(outside, "init")
    assert git_state(outside)["git_commit"] == "unknown: git: fatal: Needed a single revision"
    monkeypatch.setenv("PATH", str(outside))
    assert short_commit({"git_commit": "0123456789" * 4, "git_diff": None}) == "012345678901"
    assert short_commit({"git_commit": "0123456789" * 4, "git_diff": "diffs/0002.diff"}) == "012345678901 (dirty)"
    assert git_state(checkout)["git_commit"] == "unknown: git: No such file or directory"


def start(run: Path, step: int, ranks: Ranks, rows: bytes = b"", **options) -> dict:
    """What config.json says of a start that is recorded, in a run whose base is the folder `base` beside it."""
    (base := run.with_name("base")).mkdir(exist_ok=True)
    for name in ("tokenizer.json", "export.json", "bom.json"):  # a base that is an export: the last two are renewed
        (base / name).write_text("{}")
    config = Config(Model(str(base)), Data(()), Batch(1), Optimizer(1e-3), Run("r", **options))
    record, log = RunRecord(run, Corpus(()), ranks), SimpleNamespace(kept=lambda *arguments: rows, say=print)
    record.step, evaluations = step, SimpleNamespace(evaluated={})
    checkpointer = SimpleNamespace(record=record, identity=IDENTITY, evaluations=evaluations)
    of_run = SimpleNamespace(
        config=config, data=SimpleNamespace(local=config, total_steps=9), ranks=ranks, directory=run
    )
    line = record_start(of_run, checkpointer, log)  # type: ignore[arg-type]
    written = json.loads((run / "config.json").read_text())
    assert line.startswith(f"run {run}, commit {short_commit(written)}, torch ")
    return written


IDENTITY = {"the code": {"train.py": "1", "mine.py": "2", "gone.py": "3"}, "the weights": {"model.safetensors": "4"}}


TOKEN, QUERY = f"hf_{'aB3' * 12}", "X-Amz-Credential=AKIA%2F2026&X-Amz-Signature=0badc0de"
SECRET = "0badc0de", "AKIA", TOKEN, "hunter2"


def test_record_has_no_secrets(tmp_path, ranks, monkeypatch) -> None:
    path = f"https://me:hunter2@bucket.example/train.jsonl?part=1&{QUERY}"
    monkeypatch.setattr(sys, "argv", ["train.py", "c.py", f"data.train={path}", f"wandb={TOKEN}", "batch.tokens=4096"])
    start(tmp_path / "run", 0, ranks, approved_by=path)
    for file in ("record.jsonl", "config.json"):
        text = (tmp_path / "run" / file).read_text()
        assert not any(secret in text for secret in SECRET) and "batch.tokens=4096" in text
        assert text.count("https://REDACTED@bucket.example/train.jsonl?part=1&X-Amz-Credential=REDACTED&") >= 2
    for secret in ("s3://me:hun/ter2@bucket/x", "https://h/x#access_token=hunter2", "https://h/x;token=hunter2"):
        assert "ter2" not in without_secrets(secret)
    kept = "/data/hf_cache_of_the_whole_department/sk-learn/x.jsonl?download=true"
    assert without_secrets(kept) == kept


def test_config_json_describes_the_newest_start(checkout, tmp_path, ranks, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", checkout)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    run = tmp_path / "run"
    start(run, 0, ranks)
    with (run / "record.jsonl").open("a") as file:
        file.write('{"time": "20')  # killed while writing a record
    (checkout / "letter.txt").write_bytes(b"caf\xe9\n")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("LOGNAME", "somebody else")
    written = start(run, 7, ranks, b"12345", approved_by="A. Person")
    first, second = (entry.content for entry in Record(run).read())
    assert (first["start_step"], first["config"]["run"]["name"], first["git_diff"]) == (0, "r", None)
    assert "torchrun_restarts" not in first and second["torchrun_restarts"] == 2
    assert second["start_step"] == 7 and second["git_diff"] == "diffs/0002.diff"
    assert second["git_commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert "-plain\n+caf\\xe9\n" in (run / "diffs" / "0002.diff").read_text()  # its bytes are no UTF-8
    assert second["identity"] == IDENTITY
    assert {**second, **written} == {**second, "identity": fingerprint(IDENTITY)}
    assert second["started_by"] == first["started_by"] != "somebody else"
    base, tokenizer = tmp_path / "base", sha256(tmp_path / "base" / "tokenizer.json")
    known = {str(base / "model.safetensors"): "4", str(base / "tokenizer.json"): tokenizer}
    assert second["approved_by"] == "A. Person" and second["files"] == {"the base": known, "the data": {}}
    assert second["metrics"] == {"bytes": 5, "sha256": hashlib.sha256(b"12345").hexdigest()}
    assert second["written"].keys() == {"config.json", "diffs/0002.diff"}
    assert second["written"]["config.json"] == sha256(run / "config.json")
    assert written["versions"].keys() >= {"torch", "transformers", "numpy"} and written["world_size"] == 1
    assert written["devices"][0]["device"].startswith("cpu (") and written["time"].endswith("+00:00")


def test_each_start_keeps_its_diff(checkout, tmp_path, ranks, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "ROOT", checkout)
    run = tmp_path / "run"
    for number, text in enumerate(("first", "second"), 1):
        (checkout / "letter.txt").write_text(f"{text}\n")
        (checkout / "mine.py").write_text(f"x = {number}\n")
        (checkout / "notes.py").write_text("not loaded by train.py\n")
        record = start(run, 0, ranks)
        assert record["git_diff"] == f"diffs/000{number}.diff" and short_commit(record).endswith(" (dirty)")
    git(checkout, "add", "mine.py", "notes.py")
    git(checkout, "stash")  # the checkout is as it was committed
    assert start(run, 0, ranks)["git_diff"] is None
    diffs = sorted((run / "diffs").iterdir())
    assert [path.name for path in diffs] == ["0001.diff", "0002.diff"]
    git(checkout, "apply", str(diffs[0]))
    assert (checkout / "letter.txt").read_text() == "first\n" and (checkout / "mine.py").read_text() == "x = 1\n"
    assert not (checkout / "notes.py").exists()


def test_equally_named_processors_are_distinguished(monkeypatch) -> None:
    """Else a replay where the instructions for bf16 are missing would call the record untrue (scripts/verify/replay.py)."""
    cpu = torch.device("cpu")
    for name in ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(provenance, "bf16_instructions", lambda: ["amx_bf16", "avx512_bf16"])
    assert provenance._hardware(cpu).endswith(", amx_bf16, avx512_bf16)")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert provenance._hardware(cpu).endswith(", amx_bf16, avx512_bf16, ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16)")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")  # other bits in fp32
    assert provenance._hardware(cpu).endswith("=AVX512_CORE_BF16, MKL_CBWR=COMPATIBLE)")


def test_ranks_are_grouped_by_host_and_device() -> None:
    groups = devices([("a", "H100"), ("a", "H100"), ("b", "H100"), ("b", "A100")])
    assert [tuple(group.values()) for group in groups] == [
        ("a", "H100", [0, 1]),
        ("b", "H100", [2]),
        ("b", "A100", [3]),
    ]


def test_large_sets_of_files_are_read_partly(tmp_path, monkeypatch) -> None:
    """A corpus of 5,000 files of 40 MB would be read at every start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(provenance, "LONG", 250)
    read, files = [], [tmp_path / name for name in "abcd"]
    for file in files:
        file.write_bytes(file.name.encode() * 100)
    monkeypatch.setattr("common.sha256.sha256", lambda path: read.append(path.name) or sha256(path))
    for names in ("abcd", "ab", "ab"):
        read.clear()
        assert provenance._sums(files, print) == {str(file): sha256(file) for file in files}
        assert sorted(read) == list(names)
