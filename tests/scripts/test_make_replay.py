"""scripts/make_replay.py as real processes: the same bytes on 1 and 2, also after a kill; nothing that evaluation uses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from data.files import read_file
from data.replay_filters import Evaluated, normalised
from data.tokens import encode_chat, load_tokenizer
from eval.general_text import held_out_texts
from eval.questions import read_questions
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_replay.py"
# A random model writes noise that is neither long nor like itself.
LOOSE = ("--min-characters", 5, "--max-tokens", 150, "--batch-size", 3, "--dtype", "fp32", "--temperature", 1.5)


@pytest.fixture
def make(monkeypatch, capsys, folder):
    """The script as plain python in this process; returns what it printed."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("make_replay", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(out: str, *options: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(folder / out), *map(str, options)])
        assert module.main() == 0
        return capsys.readouterr().out

    yield call
    torch.set_num_threads(threads)


def make_on_two(folder: Path, out: str, *options: object) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, SCRIPT, "--out", folder / out, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    write_tiny_model(folder / "model")
    return folder


def sampled(folder: Path, *options: object) -> tuple:
    return ("--source", "model", "--model", folder / "model", "--documents", 8, *LOOSE, *options)


def test_topics_are_disjoint_from_what_is_evaluated(make, folder):
    printed = make("topics.jsonl", "--source", "topics")
    texts = [example["text"] for _, example in read_file(folder / "topics.jsonl")]
    assert f"{len(texts)} documents" in printed
    assert sum(map(len, texts)) > 200_000
    evaluated = Evaluated([*held_out_texts(), *(q.prompt + q.options[0] for q in read_questions())])
    assert not any(evaluated.overlaps(normalised(part)) for text in texts for part in text.split("\n\n"))


def test_any_number_of_processes_writes_the_same_chats(make, folder):
    one = make("one.jsonl", *sampled(folder))
    make_on_two(folder, "two.jsonl", *sampled(folder))
    lines = (folder / "one.jsonl").read_text().splitlines()
    assert (folder / "two.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    assert f"{len(lines)} of 8 documents" in one
    assert not (folder / "one.jsonl.parts").exists()
    chats = [example["messages"] for _, example in read_file(folder / "one.jsonl")]
    tokenizer = load_tokenizer(str(folder / "model"))
    assert len({chat[0]["content"] for chat in chats}) == len(chats) >= 2
    for chat in chats:
        assert [message["role"] for message in chat] == ["user", "assistant"]
        ids, is_target = encode_chat(tokenizer, chat)
        last = max(i for i, flag in enumerate(is_target) if flag)
        assert ids[last] == tokenizer.eos_token_id and last > 0
    assert all("<|" not in message["content"] for chat in chats for message in chat)


def test_texts_another_seed_and_a_kill(make, folder):
    """Killed after its first batch, and done again: the same file as without the kill."""
    options = sampled(folder, "--form", "text", "--start", "<|endoftext|>")
    make("texts.jsonl", *options)
    whole = (folder / "texts.jsonl").read_bytes()
    texts = [example["text"] for _, example in read_file(folder / "texts.jsonl")]
    assert len(set(texts)) == len(texts) >= 2

    make("other.jsonl", *options, "--seed", 1)
    assert (folder / "other.jsonl").read_bytes() != whole

    # What a killed run leaves: settings and the batches that are done, here one that can be told from its text.
    parts = folder / "again.jsonl.parts"
    parts.mkdir()
    settings = {"form": "text", "start": [0], "model": str(folder / "model"), "documents": 8, "max_tokens": 150}
    settings |= {"temperature": 1.5, "top_p": 0.95, "seed": 0, "batch_size": 3, "dtype": "fp32"}
    (parts / "settings.json").write_text(json.dumps(settings))
    done = {"text": "This was written before the kill.", "finished": True}
    (parts / "000000003.jsonl").write_text(json.dumps(done) + "\n")
    with pytest.raises(UserError, match="was made with another seed"):
        make("again.jsonl", *options, "--seed", 1)
    make("again.jsonl", *options)
    again = [example["text"] for _, example in read_file(folder / "again.jsonl")]
    assert done["text"] in again
    assert set(again) - {done["text"]} < set(texts)
    assert not parts.exists()
    with pytest.raises(UserError, match="exists; remove it"):
        make("again.jsonl", *options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--source", "model"], "--source model needs a --model"),
        (["--source", "model", "--model", "x"], "x is not a model directory"),
        (["--source", "model", "--model", "x", "--top-p", "0"], "--top-p lies above 0"),
        (["--source", "model", "--model", "x", "--batch-size", "0"], "--batch-size must be 1 or more"),
    ],
)
def test_a_mistake_is_one_sentence(make, options, sentence):
    with pytest.raises(UserError, match=sentence):
        make("none.jsonl", *options)
