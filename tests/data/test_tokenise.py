"""Building a token store: all file types, texts cut into pieces, and interruptions at any moment."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data.encoding
import data.tokenise
from common.durable_files import write_json
from common.errors import UserError
from data.encoding import ExampleEncoder, cut
from data.store import STORE_FILE, StoreWriter, _digest_of_info, open_store, shard_file
from data.token_store import build_store
from tests.data.test_store import ragged_texts, write_texts
from tests.processes import run_ranks
from tests.tiny import CHATML, SENTENCES, SPECIAL_TOKENS, tiny_tokenizer

# Contains runs of line ends, which a tokenizer may encode as one token.
LONG = "\n".join(f"{i}. {SENTENCES[i % 4]}" + "\n" * (i % 3) for i in range(60)) + "\nGrüße: 97,3 €\rEnde"


def tokens_of(folder: Path) -> list[int]:
    store = open_store(folder)
    return store.tokens(0, store.num_tokens).tolist()


def encoded(texts: list[str], tokenizer: PreTrainedTokenizerFast | None = None) -> list[int]:
    """The ids that training from files would see: each text tokenised as a whole, followed by EOS."""
    tokenizer = tokenizer or tiny_tokenizer()
    return [t for text in texts for t in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def line_end_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that encodes two or three line ends as one token."""
    tokenizer = tiny_tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator([LONG, "\n\n\n \n\n"] * 9, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML)
    assert len(made.encode("\n\n\n")) == 1
    return made


def marking_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the structure of Llama 2's: a mark before every text, no splitting, line ends as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "</s>", *byte_tokens], show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training: marks only begin tokens
    tokenizer.train_from_iterator(LONG.split("\n") * 3, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", chat_template=CHATML
    )
    line_end = made.convert_tokens_to_ids("<0x0A>")
    assert made.encode("\na")[1] == line_end and made.encode("a")[0] != made.encode("\na")[2]
    return made


@pytest.mark.parametrize("make_tokenizer", [line_end_tokenizer, marking_tokenizer, tiny_tokenizer])
def test_a_text_cut_into_pieces_has_the_ids_of_the_whole_text(tmp_path, monkeypatch, make_tokenizer) -> None:
    monkeypatch.setattr(data.encoding, "PIECE", 200)
    monkeypatch.setattr(data.encoding, "PIECES", 3)
    pieces = cut(LONG)
    assert len(pieces) > 20 and "".join(pieces) == LONG and max(map(len, pieces)) <= 200
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LONG.replace("\n", "\r\n").encode())
    tokenizer = make_tokenizer()
    build_store([tmp_path / "a.txt"], tokenizer, tmp_path / "store", shard_tokens=10)
    assert tokens_of(tmp_path / "store") == encoded([LONG], tokenizer)
    assert cut("a" * 450) == ["a" * 200, "a" * 200, "a" * 50] and cut("") == [""]


@pytest.fixture
def sources(tmp_path) -> list[Path]:
    """Three files with 33 documents in total, enough for several shards of a few hundred tokens."""
    texts = ragged_texts(33, seed=1)
    (tmp_path / "b.txt").write_text(texts[20])
    return [
        write_texts(tmp_path / "a.jsonl", texts[:20]),
        tmp_path / "b.txt",
        write_texts(tmp_path / "c.jsonl", texts[21:]),
    ]


def test_a_build_resumed_after_an_interruption_anywhere_gives_the_same_bytes(tmp_path, sources, monkeypatch) -> None:
    """Interrupts the build before each of the renames that publish a file, then resumes it."""
    monkeypatch.setattr(data.tokenise, "BATCH_CHARACTERS", 400)
    build_store(sources, tiny_tokenizer(), tmp_path / "whole", 700)
    whole = contents(tmp_path / "whole")
    assert len(whole) >= 6  # four shards, store.json and the lock
    replace, interrupted = os.replace, 0
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
            build_store(sources, tiny_tokenizer(), out, 700)
            assert contents(out) == whole
    assert interrupted >= 4 * 2 + 2  # each shard with store.json after it; store.json at the beginning and at the end


def test_a_resumed_build_tokenises_only_what_is_missing(tmp_path, sources, monkeypatch) -> None:
    monkeypatch.setattr(data.tokenise, "BATCH_CHARACTERS", 100)
    texts, encode = [], ExampleEncoder.encode

    def recording(encoder: ExampleEncoder, examples: list[dict]) -> list:
        texts.extend(example["text"] for example in examples)
        return encode(encoder, examples)

    monkeypatch.setattr(ExampleEncoder, "encode", recording)
    end_shard = StoreWriter.end_shard

    def stopping(writer: StoreWriter) -> None:
        if len(writer.info["shards"]) == 3:
            raise KeyboardInterrupt
        end_shard(writer)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "end_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            build_store(sources, tiny_tokenizer(), tmp_path / "store", 300)
    before = {name: data for name, data in contents(tmp_path / "store").items() if name.endswith(".tokens")}
    assert len(before) == 3
    texts.clear()
    store = build_store(sources, tiny_tokenizer(), tmp_path / "store", 300)
    done = store.document_starts[3]
    assert len(texts) == 33 - done < 33 and texts == ragged_texts(33, seed=1)[done:]
    assert all(contents(tmp_path / "store")[name] == data for name, data in before.items())


def test_a_complete_store_is_not_rebuilt(tmp_path, sources) -> None:
    first = build_store(sources, tiny_tokenizer(), tmp_path / "store")
    stamp = (tmp_path / "store" / shard_file(0)).stat().st_mtime_ns
    assert build_store(sources, tiny_tokenizer(), tmp_path / "store").info == first.info
    assert (tmp_path / "store" / shard_file(0)).stat().st_mtime_ns == stamp
    info = {key: value for key, value in first.info.items() if key != "max_samples"}  # as an earlier version wrote it
    info["files"] = [{"path": one["path"], "bytes": one["bytes"], "blake2b": ""} for one in info["files"]]
    write_json(tmp_path / "store" / STORE_FILE, info | {"digest": _digest_of_info(info)})
    assert build_store(sources, tiny_tokenizer(), tmp_path / "store").num_tokens == first.num_tokens
    (tmp_path / "store" / shard_file(0)).unlink()
    with pytest.raises(UserError, match="shard-00000.tokens is missing; remove its directory and run"):
        build_store(sources, tiny_tokenizer(), tmp_path / "store")


def test_a_build_with_other_inputs_or_a_damaged_store_is_refused(tmp_path, sources) -> None:
    out = tmp_path / "store"
    build_store(sources, tiny_tokenizer(), out, 700)
    with pytest.raises(
        UserError,
        match="the store in .*store differs .* in its tokenizer, shard_tokens; remove that directory or choose",
    ):
        build_store(sources, tiny_tokenizer(300), out, 300)
    with pytest.raises(UserError, match="in its files;"):
        build_store(sources[:2], tiny_tokenizer(), out, 700)
    with pytest.raises(UserError, match="in its shard_tokens;"):
        build_store(sources, tiny_tokenizer(), out, 301)
    build_store(sources, tiny_tokenizer(), tmp_path / "first", max_samples=1)
    with pytest.raises(UserError, match="in its max_samples;"):  # a store of fewer rows
        build_store(sources, tiny_tokenizer(), tmp_path / "first")
    with sources[0].open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match="in its files;"):
        build_store(sources, tiny_tokenizer(), out, 700)
    sources[0].write_text(sources[0].read_text().removesuffix('{"text": "more"}\n').replace("bank", "Bank"))
    with pytest.raises(UserError, match="in its files;"):  # at equal size
        build_store(sources, tiny_tokenizer(), out, 700)
    (out / STORE_FILE).write_text("{")
    with pytest.raises(
        UserError, match="store.json is damaged .*; remove its directory and run the same command again"
    ):
        build_store(sources, tiny_tokenizer(), out, 700)


def test_a_directory_with_other_files_is_not_touched(tmp_path, sources) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="other contains other files; choose another directory"):
        build_store(sources, tiny_tokenizer(), tmp_path / "other")
    assert contents(tmp_path / "other") == {"notes.md": b"mine"}
    with pytest.raises(UserError, match="notes.md is a file; choose another directory"):
        build_store(sources, tiny_tokenizer(), tmp_path / "other" / "notes.md")


def test_two_builds_of_one_store_at_once_make_it_once(tmp_path, sources) -> None:
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
