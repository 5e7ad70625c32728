"""scripts/data.py replay as processes: topics, chats from one and two processes, and mistakes on the command line."""

from pathlib import Path

import pytest

from data.formats import read_examples
from data.tokens import load_tokenizer
from eval.sample_replay import training_texts
from tests.processes import run_python, run_ranks
from tests.tiny import encode_one, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = (ROOT / "scripts" / "data.py", "replay")
# A random model writes noise, whose documents are short and unlike each other.
SAMPLING = ("--max-tokens", 150, "--batch-size", 3, "--dtype", "fp32", "--temperature", 1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    write_tiny_model(folder / "model")
    return folder


def test_topics_are_written_without_what_evaluation_uses(folder):
    done = run_python(*SCRIPT, "--source", "topics", "--out", folder / "topics.jsonl")
    assert done.returncode == 0, done.stderr
    texts = [example["text"] for example in read_examples(folder / "topics.jsonl")]
    written, known = ([part for text in some for part in text.split("\n\n")] for some in (texts, training_texts()))
    # tests/eval/test_sample_replay.py compares them with the texts of an evaluation.
    assert set(written) < set(known) and sum(map(len, texts)) > 200_000
    assert f"{len(texts)} documents" in done.stdout


def test_replay_is_independent_of_processes(folder):
    options = ("--source", "model", "--model", folder / "model", "--documents", 6, "--min-characters", 5, *SAMPLING)
    one = run_python(*SCRIPT, "--out", folder / "one.jsonl", *options)
    assert one.returncode == 0, one.stderr[-6000:]
    two = run_ranks(2, *SCRIPT, "--out", folder / "two.jsonl", "--sharding", "full", *options)
    assert two.returncode == 0, two.stderr[-6000:]
    assert (folder / "two.jsonl").read_bytes() == (folder / "one.jsonl").read_bytes()
    chats = [example["messages"] for example in read_examples(folder / "one.jsonl")]
    assert f"{len(chats)} of 6 documents" in one.stdout
    assert not (folder / "one.jsonl.parts").exists()
    tokenizer = load_tokenizer(str(folder / "model"))
    assert len({chat[0]["content"] for chat in chats}) == len(chats) >= 2
    for chat in chats:
        assert [message["role"] for message in chat] == ["user", "assistant"]
        ids, is_target = encode_one(tokenizer, {"messages": chat})
        last = max(i for i, flag in enumerate(is_target) if flag)
        assert ids[last] == tokenizer.eos_token_id and last > 0
    assert all("<|" not in message["content"] for chat in chats for message in chat)
