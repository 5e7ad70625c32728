"""The cache of encoded examples: equal to memory, built once, complete or absent, and keyed by everything that matters."""

import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import data.cache
import data.encoding
import data.formats
import data.node_lock
import data.store
import data.tokenise
from common.errors import UserError
from data.cache import Cache, clean_tokens
from data.encoding import Encoded, ExampleEncoder, Outcome, Span
from data.examples import Documents
from data.files import Reading
from data.formats import read_examples
from data.reader import Reader
from data.store import BLOCK, STORE_FILE, open_store, shard_file
from tests.in_memory import json_lines, load_documents
from tests.processes import run_ranks
from tests.tiny import CHATML, SENTENCES, tiny_tokenizer, write_chat_file

ROOT = Path(__file__).resolve().parents[2]


class WeightedEncoder(ExampleEncoder):
    """Write chats, every third of them with two spans, one of which has weight 0.25."""

    def encode(self, examples) -> list[Outcome]:
        outcomes = super().encode(examples)
        for i, (example, outcome) in enumerate(zip(examples, outcomes, strict=True)):
            ids = outcome.sequences[0].ids
            if "messages" in example and len(str(example)) % 3 == 0:
                spans = (Span(1, 3, 0.25), Span(5, len(ids)))
                outcomes[i] = Outcome((Encoded(ids, spans),))
        return outcomes


@pytest.fixture
def files(tmp_path) -> tuple[str, ...]:
    """Write 40 chats, a text that is cut into pieces, and a short text."""
    (tmp_path / "long.txt").write_text("\n".join(f"{i}. {SENTENCES[i % 4]}" for i in range(60)), encoding="utf-8")
    (tmp_path / "short.txt").write_text(SENTENCES[0], encoding="utf-8")
    return tuple(
        str(path) for path in (write_chat_file(tmp_path / "a.jsonl", 40), tmp_path / "long.txt", tmp_path / "short.txt")
    )


def load(files: tuple[str, ...], cache: Path | None = None, **options) -> Documents:
    return load_documents(files, tiny_tokenizer(), 128, "truncate", cache=cache, **options)


def content(documents: Documents) -> tuple:
    ids = [documents.get(i)[0].tolist() for i in range(len(documents))]
    weights = [documents.get(i)[1].tolist() for i in range(len(documents))]
    return ids, weights, documents.lengths.tolist(), documents.targets.tolist(), documents.fingerprint


def entries(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob(f"*/{STORE_FILE}") if path.parent.suffix != ".tmp")


def test_cache_equals_memory_for_any_number_of_processes(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data.tokenise, "BATCH_EXAMPLES", 7)
    monkeypatch.setattr(data.tokenise, "BATCH_CHARACTERS", 900)
    monkeypatch.setattr(data.encoding, "PIECE", 300)
    encoder = WeightedEncoder(tiny_tokenizer())
    memory = load(files, encoder=encoder)
    first = load(files, tmp_path / "first", encoder=encoder)
    with monkeypatch.context() as patch:
        patch.setattr(data.tokenise, "PARALLEL_BYTES", 0)
        patch.setattr(data.tokenise, "available_cores", lambda: 2)
        two = load(files, tmp_path / "two", encoder=encoder)
    again = load(files, tmp_path / "two", encoder=encoder)
    assert content(memory) == content(first) == content(two) == content(again)
    assert "; 1 long text cut into pieces of 128, each counted as an example\n" in memory.report
    assert "tokenised in" in memory.report and memory.report.endswith(" s")
    assert " s into" in two.report and str(entries(tmp_path / "two")[0]) in two.report
    assert f"from the cache {entries(tmp_path / 'two')[0]}, written 20" in again.report
    ids, weights = again.get(0)
    assert ids.dtype == np.int64 and {again.get(i)[1].dtype.char for i in range(len(again))} == {"?", "f"}
    assert again.targets.dtype == np.float64 and again.targets[0] == weights.sum() == memory.num_targets(0)
    # A text that is cut into pieces has the ids of the whole text.
    monkeypatch.setattr(data.encoding, "PIECE", 10**6)
    assert content(load(files, encoder=encoder)) == content(memory)
    assert load(files).targets.dtype == np.int64 and load(files).fingerprint != memory.fingerprint


def test_edit_at_equal_size_and_time_is_noticed(files, tmp_path) -> None:
    first, path = load(files, tmp_path / "cache"), Path(files[2])
    before = path.stat()
    path.write_text(SENTENCES[0].replace("bank", "Bank"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    second = load(files, tmp_path / "cache")
    assert second.fingerprint != first.fingerprint and content(second) == content(load(files))
    assert len(entries(tmp_path / "cache")) == 2


def test_every_input_of_the_examples_keys_the_entry(files, tmp_path) -> None:
    cache, tokenizers = tmp_path / "cache", [tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer(300)]
    tokenizers[1].chat_template = CHATML + "{# of another version #}"
    tokenizers[2].bos_token = "<|endoftext|>"

    class OtherEncoder(ExampleEncoder):
        def fingerprint(self) -> dict:
            return {"version": 2}

    renamed = tmp_path / "a.json"
    renamed.write_bytes(Path(files[0]).read_bytes())
    readings = (
        {"on_bad": "skip"},
        {"max_samples": 2},
        {"fields": {"messages": "messages"}},
        {"validation_share": 0.5, "part": "training"},
        {"validation_share": 0.5, "part": "validation"},
        {"validation_share": 0.4, "part": "training"},
    )
    variants: list[dict] = [{"encoder": ExampleEncoder(tokenizer)} for tokenizer in tokenizers]
    variants += [{"encoder": OtherEncoder(tokenizers[0])}, {"digest_of_row": lambda row: "of data.row"}]
    variants += [{"files": files[::-1]}, {"files": (str(renamed), *files[1:])}]
    variants += [{"reading": Reading(**change)} for change in readings]
    for number, variant in enumerate(variants, 1):
        for _ in range(2):
            load(**{"files": files, "cache": cache} | variant)
            assert len(entries(cache)) == number


def test_omissions_are_counted_by_reason(tmp_path) -> None:
    path = tmp_path / "a.jsonl"

    def write(*chats: object) -> tuple[str, ...]:
        path.write_bytes(json_lines([{"messages": chat} for chat in chats]))
        return (str(path),)

    question, answer = {"role": "user", "content": "a " * 50}, {"role": "assistant", "content": "b " * 50}
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = [[question, answer], short, short, [question], [short[0]], [question, short[1]], 3]
    with pytest.raises(UserError, match="a.jsonl, line 7"):
        load(write(*chats))
    documents = load_documents(write(*chats), tiny_tokenizer(), 64, "truncate", reading=Reading(on_bad="skip"))
    assert len(documents) == 2 and documents.targets.all()
    for words in (
        "LEFT OUT 2 without a target after they were truncated to 64 tokens",
        "chats without an answer of the assistant: 2",
        f"\nSKIPPED 1 malformed:\n  {path}, line 7",
        "REPEATED 1 with the content of an earlier example, but for case, white space and punctuation",
        "TRUNCATED 2 to 64",
    ):
        assert words in documents.report, documents.report
    silent = load(write([short[0], {"role": "assistant", "content": " "}])).report
    assert "\nchats with an empty answer, of which only the token that ends it carries loss: 1" in silent
    nothing = "a.jsonl: no token carries loss; a chat needs .* \\(chats without an answer of the assistant: 1"
    with pytest.raises(UserError, match=nothing):
        load(write([question]))
    with pytest.raises(UserError, match=r"no token carries loss; .*\(DROPPED 1 longer than 3 \(longest \d+\)"):
        load_documents(write(short), tiny_tokenizer(), 3, "drop")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(
        UserError, match="a.jsonl: every example is malformed; .*a.jsonl, line 1: the chat template does not render"
    ):
        load_documents(write([short[0], call]), tiny_tokenizer(), 64, "drop", reading=Reading(on_bad="skip"))


@pytest.mark.parametrize("name", ["ids", "spans", "documents", "hashes", "end", STORE_FILE, "mended"])
def test_a_damaged_entry_is_built_again(files, tmp_path, name, capsys) -> None:
    """mended: the checksum of the block fits the changed ids."""
    first = content(load(files[:1], tmp_path / "cache"))
    (entry,) = entries(tmp_path / "cache")
    starts = open_store(entry).shards[0].starts
    damaged = entry / (STORE_FILE if name == STORE_FILE else shard_file(0))
    data = bytearray(damaged.read_bytes())
    data[starts[name] + 1 if name in starts else 100 if name == "mended" else len(data) // 2] ^= 128
    if name == "mended":
        sums = starts["end"], starts["end"] + 4
        data[slice(*sums)] = zlib.crc32(data[: min(BLOCK, starts["end"])]).to_bytes(4, "little")
    damaged.write_bytes(data)
    assert content(load(files[:1], tmp_path / "cache")) == first
    (message,) = capsys.readouterr().err.splitlines()
    assert "is damaged" in message and "the data are tokenised again" in message
    assert "from the cache" in load(files[:1], tmp_path / "cache").report and not capsys.readouterr().err


def test_damaged_or_renamed_entry_is_not_used(files, tmp_path, capsys) -> None:
    """The content of store.json, such as the highest token, is checked like the tokens."""
    first, second = (content(load(part, tmp_path / "cache")) for part in (files[:1], files[1:]))
    left, right = entries(tmp_path / "cache")
    swapped = [path.rename(tmp_path / path.name) for path in (left, right)]
    swapped[0].rename(right)
    swapped[1].rename(left)
    assert (
        content(load(files[:1], tmp_path / "cache")) == first and content(load(files[1:], tmp_path / "cache")) == second
    )
    assert capsys.readouterr().err.count("is damaged (it is the entry") == 2
    info = left / STORE_FILE
    for wrong in ('"highest": 1', '"lowest": 3'):
        info.write_text(info.read_text().replace('"highest": 3', wrong))
        assert load(files[:1], tmp_path / "cache").store.highest == load(files[:1]).store.highest
        load(files[1:], tmp_path / "cache")
        assert capsys.readouterr().err.count("store.json is not what was written") == 1


def test_dangling_link_is_replaced_by_new_entry(files, tmp_path) -> None:
    first = content(load(files[:1], tmp_path / "cache"))
    (entry,) = entries(tmp_path / "cache")
    shutil.rmtree(entry)
    entry.symlink_to(tmp_path / "gone")
    assert content(load(files[:1], tmp_path / "cache")) == first
    assert entry.is_dir() and not entry.is_symlink()


def test_removal_of_entry_in_use_is_one_sentence(files, tmp_path) -> None:
    documents = load(files[:1], tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    documents.get(0)  # its file is open
    data.store._opened.cache_clear()
    with pytest.raises(UserError, match="cannot be read: No such file .*; remove .* run the same command again"):
        documents.get(0)


def test_entry_of_another_process_opens_without_lock(files, tmp_path, monkeypatch) -> None:
    """Hundreds of processes may wait for the lock, and opening an entry of 100 million examples takes seconds."""
    first, held = content(load(files, tmp_path / "other")), []

    @contextmanager
    def lock(*arguments: object) -> Iterator[None]:
        (tmp_path / "other").rename(tmp_path / "cache")  # as if the other process had built it
        held.append(True)
        yield
        held.clear()

    def opened(*arguments):
        assert not held
        return open_entry(*arguments)

    open_entry = data.cache._open_entry
    monkeypatch.setattr(data.cache, "node_lock", lock)
    monkeypatch.setattr(data.cache, "_open_entry", opened)
    monkeypatch.setattr(data.cache, "_why_not_writable", lambda directory: None)
    documents = load(files, tmp_path / "cache")
    assert content(documents) == first and len(entries(tmp_path / "cache")) == 1


def test_unwritable_cache_keeps_tokens_in_memory(files, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    documents = load(files, tmp_path / "file" / "cache")
    assert content(documents) == content(load(files))
    assert f" in memory, because {tmp_path / 'file' / 'cache'} cannot be written (Not a directory)" in documents.report


def test_unmendable_damage_is_reported(files, tmp_path, monkeypatch) -> None:
    """In a directory that cannot be written no process mends the entry, so the process that finds the damage reports it."""
    lines: list[str] = []
    reader = Reader(ExampleEncoder(tiny_tokenizer()), 2**31, 128, "drop", Cache(tmp_path / "cache", lines.append))
    reader.read(files[:1], "", Reading())
    (entry,) = entries(tmp_path / "cache")
    (entry / STORE_FILE).write_text("{}")
    monkeypatch.setattr(data.cache, "_why_not_writable", lambda directory: "Permission denied")
    assert "cannot be written (Permission denied)" in reader.read(files[:1], "", Reading()).report
    assert len(lines) == 1 and f"the cache entry {entry} is damaged" in lines[0]


def test_file_changed_during_tokenising_is_refused(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(data.node_lock.fcntl, "lockf", no_locks)
    encode = ExampleEncoder.encode

    def changing(self, examples) -> list[Outcome]:
        with open(files[2], "a") as file:
            file.write("more")
        return encode(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(ExampleEncoder, "encode", changing)
        with pytest.raises(UserError, match="short.txt changed while it was tokenised; run the same command again"):
            load(files, tmp_path / "cache")
    assert not entries(tmp_path / "cache") and not list((tmp_path / "cache").glob("*.tmp"))
    assert content(load(files, tmp_path / "cache")) == content(load(files))


def kept_parts(length: int, is_text: bool, most: int, too_long: str) -> list[tuple[int, int]]:
    """Return (start, end) of the parts of a sequence that are trained: the whole of it, unless it has more than `most` tokens."""
    if length <= most:
        return [(0, length)]
    if is_text:  # pieces overlap by a token, so that each token but the first is a target once
        return [(start, min(length, start + most)) for start in range(0, length - 1, max(1, most - 1))]
    return [(0, most)] if too_long == "truncate" else []


def part_of(encoded: Encoded, start: int, end: int) -> Encoded:
    """Return the tokens from `start` to `end` (exclusive). The first is no target, because it has no context."""
    if start == 0 and end >= len(encoded.ids):
        return encoded
    spans = (Span(max(s.start - start, 1), min(s.end, end) - start, s.weight) for s in encoded.spans)
    return Encoded(encoded.ids[start:end], tuple(span for span in spans if span.start < span.end))


def test_changed_length_settings_reuse_the_cache(files, tmp_path, monkeypatch) -> None:
    """The parts equal those of an encoder that cuts each sequence by itself (`kept_parts`)."""
    encoder = WeightedEncoder(tiny_tokenizer())
    load(files, tmp_path / "cache", encoder=encoder)
    outcomes = [o for file in files for o in encoder.encode(read_examples(file))]
    is_text = ["text" in example for file in files for example in read_examples(file)]
    monkeypatch.setattr(ExampleEncoder, "encode", None)
    monkeypatch.setattr(data.formats, "read_rows", None)  # no text is read either
    seen: dict[str, list] = {}
    for length in (1000, 128, 60, 33, 2):
        for too_long in ("truncate", "drop"):
            expected = [
                part
                for outcome, text in zip(outcomes, is_text, strict=True)
                for whole in outcome.sequences
                for ends in kept_parts(len(whole.ids), text, length, too_long)
                if (part := part_of(whole, *ends)).spans
            ]
            documents = load_documents(
                files, tiny_tokenizer(), length, too_long, encoder=encoder, cache=tmp_path / "cache"
            )
            ids, weights, lengths, targets, fingerprint = content(documents)
            assert seen.setdefault(fingerprint, ids) == ids and len(seen) == len(set(map(str, seen.values())))
            assert ids == [part.ids.tolist() for part in expected]
            assert weights == [part.weights().tolist() for part in expected]
            assert [documents.get(i)[1].dtype for i in range(len(documents))] == [
                part.weights().dtype for part in expected
            ]
            assert lengths == [len(part.ids) for part in expected]
            assert targets == [part.weights().sum(dtype=np.float64) for part in expected]
            assert documents.longest_span == max(span.end - span.start for part in expected for span in part.spans)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"a.jsonl, line \d+ has \d+ tokens, more than data.sequence_length=33; incre"):
        load_documents(files, tiny_tokenizer(), 33, "error", encoder=encoder, cache=tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 1


def test_least_recently_used_entries_are_removed(files, tmp_path, capsys) -> None:
    cache = tmp_path / "cache"

    def entry(number: int, limit: float | None) -> Path:
        return load((files[number],), cache, cache_gib=limit).store.path

    first, second = entry(0, None), entry(1, None)
    os.utime(first, (1e9, 1e9))
    os.utime(second, (2e9, 2e9))
    held = load((files[1],), cache)  # in use
    os.utime(second, (0, 0))
    third = entry(2, 1e-9)
    assert entries(cache) == sorted([second, third]) and content(held) == content(load((files[1],)))
    output = capsys.readouterr().err
    assert "data.cache_gib=1e-09: removed 1 entries of" in output and output.count("\n") == 1
    del held
    assert clean_tokens(cache, True).endswith("places") and not entries(cache)


def test_concurrent_removal_of_entry_is_no_error(files, tmp_path, monkeypatch) -> None:
    first, is_entry = load((files[0],), tmp_path / "cache").store.path, data.cache.is_entry

    def vanishing(path: Path) -> bool:
        return is_entry(path) and (path != first or shutil.rmtree(path) is None)

    monkeypatch.setattr(data.cache, "is_entry", vanishing)
    second = load((files[1],), tmp_path / "cache", cache_gib=1.0).store.path
    assert entries(tmp_path / "cache") == [second]


def no_locks(*arguments) -> None:
    raise OSError(37, "No locks available")


# Loads a.jsonl on each rank. PLANTED: code that runs when a rank begins to encode.
WORKER = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from common.errors import exit_code_of
import data.tokenise
from data.encoding import ExampleEncoder
from tests.in_memory import load_documents
data.tokenise.available_cores, data.tokenise.PARALLEL_BYTES = lambda: 2, {parallel_bytes}
from tests.tiny import tiny_tokenizer
encode = ExampleEncoder.encode
def planted(self, examples):
    with open("encoded", "a") as file:
        file.write(f"{{os.environ.get('RANK')}}\\n")
    {planted}
    return encode(self, examples)
ExampleEncoder.encode = planted
def main():
    documents = load_documents(("a.jsonl",), tiny_tokenizer(), 128, "drop", cache="cache")
    print(documents.fingerprint + " " + documents.report.replace("\\n", " "))
sys.exit(exit_code_of(main))
"""


def run_worker(
    folder: Path, ranks: int, planted: str = "pass", parallel_bytes: int = 2**20
) -> subprocess.CompletedProcess:
    if not (folder / "a.jsonl").exists():  # a new file would have another entry
        write_chat_file(folder / "a.jsonl", 20)
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), planted=planted, parallel_bytes=parallel_bytes))
    return run_ranks(ranks, folder / "worker.py", cwd=folder)


def test_two_ranks_build_once(tmp_path) -> None:
    # The builder waits until the other rank has reached the lock or has begun to encode.
    wait = "[time.sleep(0.01) for _ in range(100) if len(open('encoded').readlines()) < 2]"
    done = run_worker(tmp_path, 2, wait)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "encoded").read_text().splitlines()) == 1
    fingerprints = [line.split()[0] for line in done.stdout.splitlines()]
    assert len(fingerprints) == 2 and len(set(fingerprints)) == 1
    assert done.stdout.count("tokenised in") == 2  # both ranks say so, although only one of them did it


def test_killed_build_leaves_nothing_behind(tmp_path) -> None:
    """Kill the parent of the workers from a worker, while it encodes."""
    killed = run_worker(tmp_path, 1, "os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)", 0)
    assert killed.returncode != 0
    left = list((tmp_path / "cache").glob("*.tmp"))
    assert len(left) == 1 and not entries(tmp_path / "cache")
    done = run_worker(tmp_path, 1)
    assert done.returncode == 0, done.stderr
    assert "tokenised in" in done.stdout and not list((tmp_path / "cache").glob("*.tmp"))
    assert len(entries(tmp_path / "cache")) == 1
