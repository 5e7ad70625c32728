"""The commands build and clean of scripts/data.py: resuming after a kill, and the extent of a deletion."""

import shutil
import subprocess
from pathlib import Path

import pytest

from data.token_store import build_store
from tests.data.test_store import ragged_texts, write_texts
from tests.in_memory import load_documents
from tests.processes import run_python
from tests.tiny import tiny_tokenizer, write_chat_file

ROOT = Path(__file__).resolve().parents[2]
SHARD_TOKENS = 500

# The same build, killed by SIGKILL when the third shard is about to be renamed.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import data.store
import data.tokenise
import data.token_store
from data.store import StoreWriter
end_shard = StoreWriter.end_shard
def killed(writer):
    if len(writer.info["shards"]) == 2:
        data.store.publish = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    end_shard(writer)
StoreWriter.end_shard = killed
from data.tokens import load_tokenizer
from pathlib import Path
data.tokenise.BATCH_CHARACTERS = 1000
data.token_store.build_store([Path("texts.jsonl")], load_tokenizer("model"), Path("store"), {shard_tokens})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a tokenizer and 80 texts."""
    folder = tmp_path_factory.mktemp("build")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_texts(folder / "texts.jsonl", ragged_texts(80))
    return folder


def script(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run_python(ROOT / "scripts" / "data.py", *arguments, cwd=folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_build_resumes_to_the_same_bytes(folder, monkeypatch) -> None:
    (folder / "killed.py").write_text(KILLED.format(root=str(ROOT), shard_tokens=SHARD_TOKENS))
    killed = run_python(folder / "killed.py", cwd=folder)
    assert killed.returncode == -9, killed.stderr
    left = contents(folder / "store")
    assert {"store.json", "shard-00001.tokens", "shard-00002.tokens.tmp"} <= left.keys()
    verified = script(folder, "build", "--verify", "store")
    assert (
        verified.returncode == 2
        and "is incomplete; run the same scripts/data.py build command again" in verified.stderr
    )
    again = ("build", "texts.jsonl", "--model", "model", "--out", "store", "--shard-tokens", str(SHARD_TOKENS))
    done = script(folder, *again)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(folder)  # the store records the paths of its files as they are written on the command line
    store = build_store([Path("texts.jsonl")], tiny_tokenizer(), Path("whole"), SHARD_TOKENS)
    assert contents(folder / "store") == contents(folder / "whole")
    assert f"store: {store.num_tokens:,} tokens of 80 documents in {len(store.shards)} shards, uint16" in done.stdout
    verified = script(folder, "build", "--verify", "store")
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout == f"store: {store.num_tokens:,} tokens of 80 documents, all as written\n"
    tokens = folder / "store" / "shard-00001.tokens"
    tokens.write_bytes(b"\xff\xff" + tokens.read_bytes()[2:])
    verified = script(folder, "build", "--verify", "store")
    assert verified.returncode == 2 and "shard-00001.tokens is damaged: its bytes from 0 on" in verified.stderr


def test_missing_file_is_reported_in_one_sentence(folder) -> None:
    done = script(folder, "build", "absent.txt", "--model", "model", "--out", "other")
    assert done.returncode == 2 and done.stderr.startswith("error: absent.txt does not exist; data files are .jsonl")
    assert not (folder / "other").exists()


def test_clean_deletes_only_caches_and_stores(folder, tmp_path) -> None:
    """A cache entry as a run makes it, the leftover of a killed build, a store, and files that only look like these."""
    write_chat_file(tmp_path / "chats.jsonl", 6)
    cache = tmp_path / "artifacts" / "tokens"
    load_documents((str(tmp_path / "chats.jsonl"),), tiny_tokenizer(), 128, "truncate", cache=cache)
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    shutil.copytree(entry, cache / f"{entry.name}.host-1.tmp")
    build_store([folder / "texts.jsonl"], tiny_tokenizer(), tmp_path / "artifacts" / "store", SHARD_TOKENS)
    kept = [cache / "0123" / "mine.json", tmp_path / "artifacts" / ("0" * 32) / "mine.txt", tmp_path / "store.jsonl"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    (tmp_path / "artifacts" / "link").symlink_to(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}

    listed = script(folder, "clean", tmp_path / "artifacts")
    assert listed.returncode == 0, listed.stderr
    for words in ("tokenised examples", "leftover of a killed build", "token store"):
        assert listed.stdout.count(words) == 1
    assert f"{entry}: tokenised examples, 0.0 MiB\n" in listed.stdout
    assert listed.stdout.endswith(" MiB in 3 places; --yes deletes them\n")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before

    done = script(folder, "clean", tmp_path / "artifacts", "--yes")
    assert done.returncode == 0 and done.stdout.endswith(" MiB in 3 places\n"), done.stderr
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, tmp_path / "chats.jsonl", cache / "lock"}
    refused = script(folder, "clean", tmp_path / "nothing")
    assert (refused.returncode, refused.stderr) == (2, f"error: {tmp_path}/nothing is not a directory\n")
