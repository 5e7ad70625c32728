"""Building a token store: all file types, texts cut into pieces, and interruptions at any moment."""

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import data.encoding
import data.tokenise
from common.errors import UserError
from data.encoding import ExampleEncoder, cut
from data.store import STORE_FILE, open_store, read_info, shard_file
from data.token_store import build_store
from data.tokens import bos_ids
from tests.chat_families import family_tokenizer
from tests.data.test_store import ragged_texts, write_texts
from tests.processes import run_ranks
from tests.tiny import SENTENCES, tiny_tokenizer

# Contains runs of line ends, which some tokenizers encode as a single token.
LONG = "\n".join(f"{i}. {SENTENCES[i % 4]}" + "\n" * (i % 3) for i in range(60)) + "\nGrüße: 97,3 €\rEnde"


def tokens_of(folder: Path) -> list[int]:
    store = open_store(folder)
    return store.tokens(0, store.num_tokens).tolist()


def encoded(texts: list[str], tokenizer: PreTrainedTokenizerFast | None = None) -> list[int]:
    """Return the ids that training from files would see: each text tokenised as a whole, followed by EOS."""
    tokenizer = tokenizer or tiny_tokenizer()
    return [t for text in texts for t in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["smollm2", "llama2", "tiny"])
def test_pieces_of_a_text_have_its_ids(tmp_path, monkeypatch, family) -> None:
    """smollm2 has two line ends as one token. llama2 writes a mark before every text, has no pre-tokenizer, and adds BOS."""
    monkeypatch.setattr(data.encoding, "PIECE", 200)
    monkeypatch.setattr(data.encoding, "PIECES", 3)
    pieces, tokenizer = cut(LONG), tiny_tokenizer() if family == "tiny" else family_tokenizer(family)
    assert len(pieces) > 20 and "".join(pieces) == LONG and max(map(len, pieces)) <= 200
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LONG.replace("\n", "\r\n").encode())
    build_store([tmp_path / "a.txt"], tokenizer, tmp_path / "store", shard_tokens=10)
    assert tokens_of(tmp_path / "store") == [*bos_ids(tokenizer), *encoded([LONG], tokenizer)]
    joined = sum((tokenizer.encode(part, add_special_tokens=False) for part in pieces), [])
    # With llama2, pieces encoded alone have other ids, which is why pieces have a lead.
    assert (joined == encoded([LONG], tokenizer)[:-1]) == (family != "llama2")
    assert cut("a" * 450) == ["a" * 200, "a" * 200, "a" * 50] and cut("") == [""]


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """Write three files with 33 documents in total, enough for several shards of a few hundred tokens."""
    texts = ragged_texts(33, seed=1)
    (tmp_path / "b.txt").write_text(texts[20])
    first, last = (
        write_texts(tmp_path / f"{name}.jsonl", part) for name, part in (("a", texts[:20]), ("c", texts[21:]))
    )
    return [first, tmp_path / "b.txt", last]


def test_resumed_build_gives_the_same_bytes(tmp_path, sources, monkeypatch) -> None:
    """Interrupt the build before each rename that publishes a file. Complete shards are not tokenised again."""
    monkeypatch.setattr(data.tokenise, "BATCH_CHARACTERS", 100)
    texts, encode, replace, interrupted = [], ExampleEncoder.encode, os.replace, 0

    def recording(encoder: ExampleEncoder, examples: list[dict]) -> list:
        texts.extend(example["text"] for example in examples)
        return encode(encoder, examples)

    monkeypatch.setattr(ExampleEncoder, "encode", recording)
    build_store(sources, tiny_tokenizer(), tmp_path / "whole", 700)
    whole = contents(tmp_path / "whole")
    assert len(whole) >= 6 and texts == ragged_texts(33, seed=1)  # four shards, store.json and the lock
    while True:
        out, count = tmp_path / f"stopped-{interrupted}", iter(range(10**6))

        def stopping(source: Path, target: Path, count=count, at=interrupted) -> None:
            if next(count) == at:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stopping)
        try:
            build_store(sources, tiny_tokenizer(), out, 700)
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break  # the build has fewer renames
        finally:
            monkeypatch.setattr(os, "replace", replace)
        if (out / STORE_FILE).is_file():
            info = read_info(out)
            done = 33 if info["complete"] else sum(shard["documents"] for shard in info["shards"])
            texts.clear()
            build_store(sources, tiny_tokenizer(), out, 700)
            assert contents(out) == whole and texts == ragged_texts(33, seed=1)[done:]
    assert interrupted >= 4 * 2 + 2  # each shard with store.json after it; store.json at the beginning and at the end


def test_a_complete_store_is_not_rebuilt(tmp_path, sources) -> None:
    first = build_store(sources, tiny_tokenizer(), tmp_path / "store")
    stamp = (tmp_path / "store" / shard_file(0)).stat().st_mtime_ns
    assert build_store(sources, tiny_tokenizer(), tmp_path / "store").info == first.info
    assert (tmp_path / "store" / shard_file(0)).stat().st_mtime_ns == stamp
    (tmp_path / "store" / shard_file(0)).unlink()
    with pytest.raises(UserError, match="shard-00000.tokens is missing; remove its directory and run"):
        build_store(sources, tiny_tokenizer(), tmp_path / "store")


def test_changed_inputs_or_damaged_store_are_refused(tmp_path, sources) -> None:
    out = tmp_path / "store"
    build_store(sources, tiny_tokenizer(), out, 700)
    text = sources[0].read_text()

    def refused(words: str, files: list[Path] = sources, tokenizer=None, shard_tokens: int = 700, **options) -> None:
        with pytest.raises(UserError, match=words):
            build_store(files, tokenizer or tiny_tokenizer(), out, shard_tokens, **options)

    refused(
        "the store in .*store differs .* in its tokenizer, shard_tokens; remove that", sources, tiny_tokenizer(300), 9
    )
    refused("in its files;", sources[:2])
    refused("in its max_samples;", max_samples=1)  # a store of fewer rows
    for changed in (text + '{"text": "more"}\n', text.replace("bank", "Bank")):  # the second at equal size
        sources[0].write_text(changed)
        refused("in its files;")
    (out / STORE_FILE).write_text("{")
    refused("store.json is damaged .*; remove its directory and run the same command again")


def test_a_directory_with_other_files_is_not_touched(tmp_path, sources) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="other contains other files; choose another directory"):
        build_store(sources, tiny_tokenizer(), tmp_path / "other")
    assert contents(tmp_path / "other") == {"notes.md": b"mine"}
    with pytest.raises(UserError, match="notes.md is a file; choose another directory"):
        build_store(sources, tiny_tokenizer(), tmp_path / "other" / "notes.md")


def test_concurrent_builds_make_the_store_once(tmp_path, sources) -> None:
    """Each process writes a line for every text that it tokenises."""
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(Path(__file__).resolve().parents[2])))
    done = run_ranks(2, tmp_path / "worker.py", *(path.name for path in sources), cwd=tmp_path)
    assert done.returncode == 0 and len(set(done.stdout.split())) == 1, done.stderr
    assert len((tmp_path / "tokenised").read_text().splitlines()) == 33
    assert tokens_of(tmp_path / "store") == encoded(ragged_texts(33, seed=1))


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from data.token_store import build_store
from data.encoding import ExampleEncoder
from tests.tiny import tiny_tokenizer
encode = ExampleEncoder.encode
def recording(self, examples):
    with open("tokenised", "a") as file:
        file.write("x\\n" * len(examples))
    return encode(self, examples)
ExampleEncoder.encode = recording
print(build_store(list(map(Path, sys.argv[1:])), tiny_tokenizer(), Path("store"), 300).fingerprint)
"""
