"""The command scripts/build_tokens.py: resuming after a kill, the benchmark, and errors."""

import re
import subprocess
from pathlib import Path

import pytest

from data.token_build import build_store
from tests.data.test_token_store import ragged_texts, write_texts
from tests.processes import run_python
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARD_TOKENS = 500

# The same build, killed by SIGKILL when the third shard is about to be renamed.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import data.text_pieces
import data.token_build
publish, published = data.token_build.ShardWriter.publish, []
def killed(writer):
    published.append(publish(writer) if len(published) < 2 else os.kill(os.getpid(), signal.SIGKILL))
    return published[-1]
data.token_build.ShardWriter.publish = killed
from data.tokens import load_tokenizer
from pathlib import Path
data.text_pieces.BATCH_CHARACTERS = 1000
data.token_build.build_store([Path("texts.jsonl")], load_tokenizer("model"), Path("store"), {shard_tokens})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer and 80 texts."""
    folder = tmp_path_factory.mktemp("build")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_texts(folder / "texts.jsonl", ragged_texts(80))
    return folder


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run_python(ROOT / "scripts" / "build_tokens.py", *arguments, cwd=folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resuming_after_a_kill_gives_the_bytes_of_an_uninterrupted_build(folder, monkeypatch) -> None:
    (folder / "killed.py").write_text(KILLED.format(root=str(ROOT), shard_tokens=SHARD_TOKENS))
    killed = run_python(folder / "killed.py", cwd=folder)
    assert killed.returncode == -9, killed.stderr
    left = contents(folder / "store")
    assert {"build.json", "shard-00001.tokens", "shard-00002.tokens.tmp"} <= left.keys()
    again = ("texts.jsonl", "--model", "model", "--out", "store", "--shard-tokens", str(SHARD_TOKENS))
    done = script(folder, *again)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(folder)  # the store records the paths of its files as given
    store = build_store([Path("texts.jsonl")], tiny_tokenizer(), Path("whole"), SHARD_TOKENS)
    assert contents(folder / "store") == contents(folder / "whole")
    assert f"store: {store['tokens']:,} tokens of 80 documents in {len(store['shards'])} shards, uint16" in done.stdout
    assert "tokenise: 100%" in done.stderr  # the progress bar
    verified = script(folder, "--verify", "store")
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout == f"store: {store['tokens']:,} tokens of 80 documents, all as written\n"
    tokens = folder / "store" / "shard-00001.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"\xff")
    verified = script(folder, "--verify", "store")
    assert verified.returncode == 2 and "shard-00001.tokens is damaged: its bytes from 0 on" in verified.stderr


def test_benchmark_prints_the_relative_speed_and_builds_nothing(folder) -> None:
    before = sorted(path.name for path in folder.iterdir())
    done = script(folder, "texts.jsonl", "--model", "model", "--benchmark")
    assert done.returncode == 0, done.stderr
    alone, built, share = re.fullmatch(
        r"0 MB of text, best of 3: tokenizers alone ([\d.]+) MB/s, the whole build ([\d.]+) MB/s: (\d+)%; "
        r"in CPU time [\d.]+ s and [\d.]+ s: \d+%\n",
        done.stdout,
    ).groups()
    assert float(built) > 0 and float(share) == pytest.approx(100 * float(built) / float(alone), rel=0.2)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_missing_file_is_reported_in_one_sentence(folder) -> None:
    done = script(folder, "absent.txt", "--model", "model", "--out", "other")
    assert (done.returncode, done.stderr) == (2, "error: absent.txt does not exist\n")
    assert not (folder / "other").exists()
