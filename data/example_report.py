"""What was read from data files and what was left out, as lines for the log."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.encoding import NOTES, control_line, note_sentence
from data.held_out import BUT_FOR
from data.tokenise import ExampleSettings


def example_report(
    info: dict,
    settings: ExampleSettings,
    files: Sequence[Path],
    counts: dict[str, int],
    lengths: np.ndarray,
    targets: np.ndarray,
) -> str:
    """Lines about a source: what it has, then remarks.

    info: what was written with its store (data/tokenise.py). files: where the files are now; they may have been elsewhere when
    they were encoded. counts: of examples by reason and note. lengths, targets: of what is trained.
    """
    size, longest = settings.sequence_length, counts["longest_read"]
    tokens, sequences, num_files = int(lengths.sum()), len(lengths), info["files"]
    total = f"{int(targets.sum()):,}" if targets.dtype == np.int64 else f"{targets.sum():,.1f} (by weight)"
    parts = [
        f"{sequences:,} example{_s(sequences)} from {num_files} file{_s(num_files)}, {tokens:,} tokens "
        f"({tokens / sequences:.0f} per example, longest {lengths.max()}), {total} of them targets"
    ]
    if cut := counts.get("cut", 0):
        parts[0] += f"; {cut:,} long text{_s(cut)} cut into pieces of {size}, each counted as an example"

    def add(key: str, sentence: str) -> None:
        if count := counts.get(key, 0):
            parts.append(sentence.format(n=f"{count:,}", s=_s(count), have="has" if count == 1 else "have"))

    places = {before: now for before, now in zip(info["paths"], map(str, files), strict=True) if before != now}
    parts += [_moved(line, places) for line in info["forms"]]
    if info["left_out"]:
        names = ", ".join(info["left_out"][:3]) + (", ..." if len(info["left_out"]) > 3 else "")
        parts.append(f"{len(info['left_out'])} file{_s(len(info['left_out']))} of another kind LEFT OUT ({names})")
    add("drop", f"DROPPED {{n}} longer than {size} (longest {longest})")
    add("truncate", f"TRUNCATED {{n}} to {size} (longest {longest})")
    add(
        "empty_truncated",
        f"{{n}} example{{s}} {{have}} no target left after being truncated to {size} tokens: LEFT OUT",
    )
    add("empty", "{n} example{s} without any target LEFT OUT")
    add("left", "{n} row{s} LEFT OUT by data.row")
    if count := counts.get("skipped", 0):
        shown = [_moved(line, places) for line in info["bad"]]
        listed = "" if len(shown) == count else f", the first {len(shown)} of them"
        parts += [f"SKIPPED {count:,} malformed{listed}:", *(f"  {sentence}" for sentence in shown)]
    add("other_part", "{n} example{s} " + ("held out" if settings.part == "training" else "not held out"))
    if count := info["repeated"]:
        parts.append(
            f"REPEATED: {count:,} example{_s(count)} say{'s' if count == 1 else ''} what an earlier one says, {BUT_FOR}"
        )
    for note in NOTES:
        if not (count := counts.get(f"note:{note}", 0)):
            continue
        if note == "control":
            parts.append(control_line(count, [_moved(line, places) for line in info["control"]]))
            continue
        parts.append(note_sentence(note, count))
        if note == "split":
            split, whole = counts["split_tokens"], counts["whole_tokens"]
            parts[-1] += f": {split:,} tokens where one sequence each would have {whole:,}"
    return "\n".join(parts)


def _moved(line: str, places: dict[str, str]) -> str:
    """A line that begins with the path of a file, with the path where the file is now."""
    found = [path for path in places if line.startswith((f"{path}:", f"{path},", f"{path} "))]
    path = max(found, key=len, default="")
    return places.get(path, "") + line[len(path) :]


def _s(count: int) -> str:
    return "" if count == 1 else "s"
