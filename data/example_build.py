"""Read and encode the examples of data files, on all cores, into a store (data/example_store.py)."""

import os
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.cores import available_cores
from common.errors import UserError
from data.encoding import NOTES, ExampleEncoder, note_sentence
from data.example_store import ExampleStore, ExampleWriter
from data.files import Advance, describe_files, expand, left_out, read_files
from data.held_out import content_hash, group_hash, is_held_out, key_of, num_repeated
from data.parallel_encoding import (
    PARALLEL_BYTES,
    ExampleSettings,
    Job,
    JobEncoder,
    Result,
    encode_jobs,
    make_jobs,
)

NO_TARGET = ("unanswered", "weightless")  # notes of examples without any target
LISTED = 5  # skipped examples that are named in the report


def build_examples(
    paths: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    encoder: ExampleEncoder,
    settings: ExampleSettings,
    folder: Path | None,
    processes: int | None = None,
    progress: str | None = None,
) -> ExampleStore:
    """Encode the examples of `paths` into the empty directory `folder`, or into memory if it is None.

    `processes` and `progress` are as in `load_documents`. Raises UserError for a bad file, for an example that cannot be
    encoded (unless settings.on_bad is skip), and if nothing is left to train on.
    """
    files = expand(paths)
    size = sum(file.stat().st_size for file in files)
    if processes is None:
        ranks = (
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if folder is None else 1
        )  # in memory, each rank has its own
        processes = max(1, available_cores() // ranks) if size >= PARALLEL_BYTES else 1
    highest_id = max(tokenizer.get_vocab().values(), default=0)
    writer = ExampleWriter(folder, np.dtype("<u2" if highest_id < 2**16 else "<u4"))
    job_encoder = JobEncoder(encoder, settings)
    counts: Counter = Counter()
    bad: list[str] = []
    opened: list[Path] = []  # data.max_samples may end before the last file
    control: list[str] = []
    with tqdm(
        desc=f"tokenise {progress}",
        total=size,
        unit="B",
        unit_scale=True,
        leave=False,
        mininterval=0.5,
        disable=None if progress else True,  # None: where stderr is no terminal, on which an error begins a line
    ) as bar:
        read = _read(files, opened, lambda count: cast(None, bar.update(count)), settings, counts, bad)
        examples = _kept(read, settings, counts, bad, writer)
        results = _results(make_jobs(examples, job_encoder.can_cut), job_encoder, processes)
        try:
            for result in results:
                _take(result, writer, counts, bad, settings)
                control += result.control[: LISTED - len(control)]
            _check_not_empty(paths, counts, bad, writer, settings)
            info = {
                "counts": dict(counts),
                "bad": bad,
                "control": control,
                "files": len(opened),
                "paths": [str(file) for file in files],
                "left_out": [str(file) for file in left_out(paths)],
                "forms": describe_files(opened, settings.reading),
                "repeated": num_repeated(writer.read_hashes()),
                "processes": processes,
                "written": time.strftime("%Y-%m-%d"),
            }
            return writer.finish(info)
        finally:
            results.close()
            writer.close()


def _read(
    files: list[Path], opened: list[Path], advance: Advance, settings: ExampleSettings, counts: Counter, bad: list[str]
) -> Iterator[tuple[str, dict]]:
    def left() -> None:
        counts["left"] += 1

    def noted() -> Iterator[Path]:
        for file in files:
            opened.append(file)
            yield file

    return read_files(noted(), advance, settings.reading, lambda sentence: _skip(sentence, counts, bad), left)


def _skip(sentence: str, counts: Counter, bad: list[str]) -> None:
    counts["skipped"] += 1
    if len(bad) < LISTED:
        bad.append(sentence)


def _kept(
    examples: Iterator[tuple[str, dict]],
    settings: ExampleSettings,
    counts: Counter,
    bad: list[str],
    writer: ExampleWriter,
) -> Iterator[tuple[str, dict]]:
    """The examples of this part (training or validation), with the keys of their content written down."""
    keys, split_by = [], settings.reading.split_by
    for where, example in examples:
        content = content_hash(example)
        if settings.part != "all":
            group = group_hash(example, split_by) if split_by else content
            if group is None:
                sentence = (
                    f"{where} has no `{split_by}` beside the keys of its form, by whose value data.split_by splits"
                )
                if settings.reading.on_bad == "error":
                    raise UserError(sentence)
                _skip(sentence, counts, bad)
                continue
            if is_held_out(group, settings.validation_share) != (settings.part == "validation"):
                counts["other_part"] += 1
                continue
        counts["examples"] += 1
        keys.append(key_of(content))
        yield where, example
        if len(keys) >= 4096:
            writer.add_hashes(np.array(keys, dtype=np.uint64))
            keys.clear()
    writer.add_hashes(np.array(keys, dtype=np.uint64))


def _results(jobs: Iterator[Job], encoder: JobEncoder, processes: int) -> Generator[Result, None, None]:
    """The results of all jobs. The pieces of a long text, which may be in several jobs, become one result."""
    parts: list[np.ndarray] = []
    control: list[str] = []
    for job, done in encode_jobs(jobs, encoder, processes):
        if isinstance(done, Result):
            yield done
            continue
        for (text, _, ends, where, example), ids in zip(job.pieces, done, strict=True):
            parts.append(ids)
            control += encoder.encoder.control.found_in(text)
            if ends:
                yield encoder.join(parts, where, example | {"text": " ".join(control)})
                parts, control = [], []


def _take(result: Result, writer: ExampleWriter, counts: Counter, bad: list[str], settings: ExampleSettings) -> None:
    for where, sentence in result.bad:
        if settings.reading.on_bad == "error":
            raise UserError(f"{where}: {sentence}")
        _skip(f"{where}: {sentence}", counts, bad)
    if result.refused:
        raise UserError(result.refused)
    longest = max(counts["longest_read"], result.counts.pop("longest", 0))
    counts.update(result.counts)
    counts["longest_read"] = longest
    writer.add(result.sequences)


def _check_not_empty(
    paths: tuple[str, ...], counts: Counter, bad: list[str], writer: ExampleWriter, settings: ExampleSettings
) -> None:
    """Raise UserError if there is nothing to train on."""
    names, limit = ", ".join(paths), f"data.sequence_length={settings.sequence_length}"
    if writer.num_sequences:
        return
    if not counts["examples"]:
        raise UserError(
            f"{names}: data.validation_share={settings.validation_share} leaves no example for {settings.part} "
            f"(examples read: {counts['other_part']}); change it"
        )
    if counts["drop"] and not counts["empty"]:
        raise UserError(
            f"all {counts['drop']} examples in {names} are longer than {limit}; increase it (the longest example has "
            f"{counts['longest_read']} tokens)"
        )
    skipped = f"; {counts['skipped']} malformed examples are skipped, the first: {bad[0]}" if bad else ""
    # Why an example has no target, besides its length.
    found = [note_sentence(note, count) for note in NOTES if note in NO_TARGET and (count := counts[f"note:{note}"])]
    why = f" ({'; '.join(found)})" if found else ""
    raise UserError(
        f"{names}: no token carries loss; a chat needs an assistant message within {limit} tokens{why}{skipped}"
    )
