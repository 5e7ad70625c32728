"""Read and encode the examples of data files, on all cores, into a store (data/example_store.py)."""

import os
import time
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm

from common.cores import available_cores
from common.errors import UserError
from data.encoding import ExampleEncoder
from data.example_store import ExampleStore, ExampleWriter
from data.files import Advance, read_file
from data.held_out import content_hash, is_held_out, key_of, num_repeated
from data.parallel_encoding import PARALLEL_BYTES, ExampleSettings, Job, JobEncoder, Result, encode_jobs, make_jobs

LISTED = 5  # skipped examples that are named in the report


def build_examples(
    paths: tuple[str, ...],
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
    size = sum(Path(path).stat().st_size for path in paths if Path(path).is_file())
    if processes is None:
        ranks = (
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if folder is None else 1
        )  # in memory, each rank has its own
        processes = max(1, available_cores() // ranks) if size >= PARALLEL_BYTES else 1
    highest_id = max(encoder.tokenizer.get_vocab().values(), default=0)
    writer = ExampleWriter(folder, np.dtype("<u2" if highest_id < 2**16 else "<u4"))
    job_encoder = JobEncoder(encoder, settings)
    counts: Counter = Counter()
    bad: list[str] = []
    with tqdm(
        desc=f"tokenise {progress}",
        total=size,
        unit="B",
        unit_scale=True,
        leave=False,
        mininterval=0.5,
        disable=not progress,
    ) as bar:
        examples = _kept(_read(paths, lambda count: cast(None, bar.update(count))), settings, counts, writer)
        results = _results(make_jobs(examples, job_encoder.can_cut), job_encoder, processes)
        try:
            for result in results:
                _take(result, writer, counts, bad, settings)
            sums = _finish(paths, counts, bad, writer, settings)
            return writer.finish(sums | {"processes": processes, "written": time.strftime("%Y-%m-%d")})
        finally:
            results.close()
            writer.close()


def _read(paths: tuple[str, ...], advance: Advance) -> Iterator[tuple[str, dict]]:
    for path in paths:
        yield from read_file(path, advance)


def _kept(
    examples: Iterator[tuple[str, dict]], settings: ExampleSettings, counts: Counter, writer: ExampleWriter
) -> Iterator[tuple[str, dict]]:
    """The examples of this part (training or validation), with the keys of their content written down."""
    keys = []
    for where, example in examples:
        content = content_hash(example)
        if settings.part != "all" and is_held_out(content, settings.validation_share) != (
            settings.part == "validation"
        ):
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
    for job, done in encode_jobs(jobs, encoder, processes):
        if isinstance(done, Result):
            yield done
            continue
        for (_, _, ends, where, example), ids in zip(job.pieces, done, strict=True):
            parts.append(ids)
            if ends:
                yield encoder.join(parts, where, example)
                parts = []


def _take(result: Result, writer: ExampleWriter, counts: Counter, bad: list[str], settings: ExampleSettings) -> None:
    for where, sentence in result.bad:
        if settings.on_bad == "error":
            raise UserError(f"{where}: {sentence}")
        counts["skipped"] += 1
        if len(bad) < LISTED:
            bad.append(f"{where}: {sentence}")
    if result.refused:
        raise UserError(result.refused)
    longest = max(counts["longest_read"], result.counts.pop("longest", 0))
    counts.update(result.counts)
    counts["longest_read"] = longest
    writer.add(result.sequences)


def _finish(
    paths: tuple[str, ...], counts: Counter, bad: list[str], writer: ExampleWriter, settings: ExampleSettings
) -> dict:
    """What the report needs. Raises UserError if no example is left."""
    names, limit = ", ".join(paths), f"data.sequence_length={settings.sequence_length}"
    if not counts["examples"]:
        raise UserError(
            f"{names}: the {settings.part} part is empty with data.validation_share={settings.validation_share}; change it"
        )
    if not writer.num_sequences:
        if counts["skipped"] == counts["examples"]:
            raise UserError(f"all {counts['examples']} examples in {names} are malformed; the first: {bad[0]}")
        if counts["drop"] and not counts["empty"]:
            raise UserError(
                f"all {counts['examples']} examples in {names} are longer than {limit}; increase it (the longest example "
                f"has {counts['longest_read']} tokens)"
            )
        raise UserError(f"{names}: no token carries loss; a chat needs an assistant message within {limit} tokens")
    hashes = writer.read_hashes()
    return {"counts": dict(counts), "files": len(paths), "bad": bad, "repeated": num_repeated(hashes)}
