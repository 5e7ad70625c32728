"""The record of a run, runs/NAME/record.jsonl: what it did, in entries that nobody can change without a trace (docs/check.md).

Entry N is line N, a JSON object with `entry` N, the SHA-256 of the line before it in `previous`, its `kind` and its `time`.
The SHA-256 of the last line is the head of the record. Each entry has the SHA-256 of what it speaks of: a start of its
identity's parts and of all files that were read, a checkpoint of its manifest and its tensors, an export of its export.json;
and each one in a run has those of the plan and of the curves so far. `prepared` has the files that the base has made before the
first step.

`plan`: after step s it is the SHA-256 of what it was before, of s and of the documents of step s. A document is named by its
number in its source and by the fingerprint of all tokens of that source. `metrics`: of the first bytes of metrics.jsonl.

An entry is written before what it speaks of gets its name, or loses it: what a kill leaves behind has one. No entry has a text
of the data.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.durable_files import fsync
from common.errors import UserError
from common.sha256 import remembered_sha256, sha256
from data.batches import StepBatch
from data.dealing import Items
from data.sources import Corpus
from distributed.checkpoint_directory import MANIFEST, checkpoint_name, complete_checkpoints, step_of
from distributed.process_group import Ranks, read_on_first

FILE, METRICS = "record.jsonl", "metrics.jsonl"
PREPARED = ("anchor", "ewc")  # directories beside it (training/anchor.py, model/ewc.py)
SAVE = re.compile(rb'\{"step": \d+, "save/pause_seconds": [\d.e-]+, "save/total_seconds": [\d.e-]+\}')  # a row
AGAIN = "restore the file, or choose another run.name"


@dataclass(frozen=True)
class Entry:
    """A line of the record. digest: the SHA-256 of its bytes, without the line end. content: all of it."""

    number: int
    kind: str
    digest: str
    content: dict

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return self.content.get("step", 0)

    def __str__(self) -> str:
        return f"entry {self.number} ({self.kind}{f', step {self.step}' if 'step' in self.content else ''})"


class Record:
    """The record in the directory of a run. Several processes may append to it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / FILE

    def append(self, kind: str, **content: Any) -> str:
        """Add an entry, durably, and return the head. A last line that a kill cut off is removed first.

        Raises UserError if the file cannot be written.
        """
        try:
            is_new = not self.path.exists()
            with self.path.open("a+b") as file:
                with suppress(OSError):  # a disk without locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # a thread that saves, or scripts/export.py, may append as well
                file.seek(0)
                whole, _, torn = file.read().rpartition(b"\n")
                if torn:
                    file.truncate(file.tell() - len(torn))
                lines = whole.split(b"\n") if whole else []
                entry = {"entry": len(lines) + 1, "previous": _sha256(lines[-1]) if lines else "", "kind": kind}
                entry["time"] = datetime.now(UTC).isoformat(timespec="seconds")
                line = json.dumps(entry | content).encode()
                file.write(line + b"\n")  # mode "a": at the end
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                fsync(self.path.parent)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); mend the disk and start again"
            ) from error
        return _sha256(line)

    def read(self) -> list[Entry]:
        """All entries; none before the first start. Raises UserError where the chain is broken.

        A last line without its end was being written when the process died, and does not count.
        """
        content = self.path.read_bytes() if self.path.is_file() else b""
        entries, previous = [], ""
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                found = json.loads(line)
                kind, claimed, before = found["kind"], found["entry"], found["previous"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{self.path}, line {number} is not an entry of a record; {AGAIN}") from error
            if claimed != number or before != previous:
                raise UserError(
                    f"{self.path}: entry {claimed} in line {number} does not follow the line before it; one of the two was "
                    f"changed, or an entry was dropped, inserted or moved; {AGAIN}"
                )
            previous = _sha256(line)
            entries.append(Entry(number, kind, previous, found))
        return entries

    def named(self, step: int, manifest: str, entries: list[Entry] | None = None) -> Entry:
        """The newest entry about the checkpoint of `step`. Raises UserError if none has this SHA-256 of its manifest.json.

        entries: those that count (`not_given_up`), if they have been read.
        """
        counted = not_given_up(self.read()) if entries is None else entries
        found = [entry for entry in counted if entry.kind == "checkpoint" and entry.step == step]
        if manifest not in [entry.content["manifest"] for entry in found]:
            raise UserError(
                f"{self.path} has no entry about the checkpoint of step {step} as it is: another run has made it, or it was "
                f"changed; {AGAIN}"
            )
        return found[-1]

    def torn(self) -> bool:
        """Whether the last line was cut off by a kill."""
        return self.path.is_file() and self.path.read_bytes()[-1:] not in (b"", b"\n")

    def head(self) -> str:
        """The SHA-256 of the last entry; an empty text before the first. Raises UserError as `read` does."""
        entries = self.read()
        return entries[-1].digest if entries else ""


def newest_start(directory: Path) -> dict:
    """What config.json says of the newest start of a run; empty if it has not started."""
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class RunRecord(Record):
    """The record of a run that is training, on all ranks. Its running hashes are those of the steps that are finished."""

    def __init__(self, directory: Path, corpus: Corpus, ranks: Ranks) -> None:
        super().__init__(directory)
        self.ranks, self.sources = ranks, [source.fingerprint for source in corpus.sources]
        self.plan, self.step = "", 0
        self.metrics, self.size = hashlib.sha256(), 0  # on rank 0

    def continue_from(self, step: int, manifest: str | None, kept: Callable[[], bytes]) -> list[str]:
        """Go on after the checkpoint of `step`, or from the base model, where nothing has to be restored but the chain.

        manifest: the SHA-256 of the checkpoint's manifest.json. kept: the rows of metrics.jsonl that are not written again.
        Returns lines for the user. A collective. Raises UserError if anything does not verify.
        """

        def check() -> tuple[str, list[str]]:
            entries = self.read()
            lines = (
                [f"warning: {self.path}: the last line was cut off by a kill, and is removed"] if self.torn() else []
            )
            for part in PREPARED:
                known = prepared_in(entries, part)
                for name in [name for name, digest in self._prepared(part).items() if known.get(name) != digest]:
                    if known:  # else a kill came before the entry
                        path = self.directory / part
                        raise UserError(
                            f"{path / name} is not what {FILE} says; remove {path}, and the base makes it again"
                        )
            history, folder = not_given_up(entries), self.directory / "checkpoints"
            gone = {name for one in entries for key in ("removed", "set_aside") for name in one.content.get(key, ())}
            saved = [checkpoint_name(one.step) for one in history if one.kind == "checkpoint" and one.step > step]
            if lost := [name for name in saved if name not in gone and not (folder / name).exists()]:
                lines.append(
                    f"warning: {folder / lost[-1]}, which {FILE} names, is not there: its steps are trained again"
                )
            if manifest is None:
                return "", lines
            named = self.named(step, manifest, history)
            for path in complete_checkpoints(folder):
                if step_of(path) < step:  # the best one and those of a budget may be exported
                    self.named(step_of(path), sha256(path / MANIFEST), history)
            newest = [one for one in entries if one.kind in ("start", "checkpoint", "stop") and one.step == step][-1]
            found = (self.directory / METRICS).read_bytes() if (self.directory / METRICS).is_file() else b""
            wanted, rows = newest.content["metrics"], kept()
            later = found[wanted["bytes"] :].splitlines()
            if newest.kind != "stop":  # a kill came: rows that are dropped now, and of saves in the background
                left = set(rows.splitlines())
                later = [line for line in later if line in left and not SAVE.fullmatch(line)]
            is_whole = _sha256(found[: wanted["bytes"]]) == wanted["sha256"] and not later
            # The rows are dropped after the entry of a start: a kill may have come in between.
            if not is_whole and _sha256(rows) != wanted["sha256"]:
                raise UserError(
                    f"{self.directory / METRICS} is not what {newest} of {FILE} says: a row up to step {step} was changed or "
                    f"added; {AGAIN}"
                )
            return named.content["plan"], lines

        self.step = step
        self.plan, lines = read_on_first(check, self.ranks)
        return lines

    def start(self, rows: bytes, **content: Any) -> str:
        """Append the entry of this start, before metrics.jsonl is cut down to `rows`; returns the head. For rank 0 alone."""
        self.metrics, self.size = hashlib.sha256(rows), len(rows)
        return self.append("start", **self._state(), **content)

    def add_prepared(self, folder: str) -> None:
        """Add what the base has made in one of PREPARED, if that is not what the record says. A collective."""

        def new() -> dict[str, str]:
            sums = self._prepared(folder)
            return {} if sums == prepared_in(self.read(), folder) else sums

        if sums := read_on_first(new, self.ranks):
            self.add("prepared", folder=folder, files=sums)

    def _prepared(self, folder: str) -> dict[str, str]:
        """The SHA-256 of each of its files."""
        paths = sorted((self.directory / folder).glob("*"))
        return {path.name: digest for path, digest in remembered_sha256(paths).items()} if paths else {}

    def add_step(self, step: int, batch: StepBatch) -> None:
        """`step` steps are finished, the last of them with this batch."""
        self.plan, self.step = plan_after(self.plan, step, self.sources, batch.items), step

    def so_far(self) -> dict:
        """Step, plan and curves up to now, for an entry. A collective, which raises UserError if rank 0 cannot read its curves."""

        def read() -> dict:
            path = self.directory / METRICS
            if path.is_file():
                with path.open("rb") as file:
                    file.seek(self.size)
                    new = file.read()
                    os.fsync(file.fileno())  # an entry is durable, and speaks of these rows
                self.metrics.update(new)
                self.size += len(new)
            return self._state()

        return read_on_first(read, self.ranks)

    def evaluation(self, figures: dict[str, Any]) -> None:
        """Add the numbers of an evaluation; a sample of the answers is a text, and stays out. A collective."""
        self.add("evaluation", figures={name: value for name, value in figures.items() if not isinstance(value, str)})

    def add(self, kind: str, **content: Any) -> str:
        """Append an entry about the steps so far and `content`; returns the head. A collective, which raises UserError."""
        so_far = self.so_far()
        return read_on_first(lambda: self.append(kind, **so_far, **content), self.ranks)

    def _state(self) -> dict:
        metrics = {"bytes": self.size, "sha256": self.metrics.hexdigest()}
        return {"step": self.step, "plan": self.plan, "metrics": metrics}


def plan_after(plan: str, step: int, sources: list[str], items: Items) -> str:
    """`plan` of the record after `step` steps, from what it was before. sources: their fingerprints. items: of that step."""
    return _sha256(repr((plan, step, sources, items)).encode())


def prepared_in(entries: list[Entry], folder: str) -> dict[str, str]:
    """The files of the last entry `prepared` about one of PREPARED, and their SHA-256."""
    found = [entry for entry in entries if entry.kind == "prepared" and entry.content["folder"] == folder]
    return found[-1].content["files"] if found else {}


def not_given_up(entries: Iterable[Entry]) -> list[Entry]:
    """The entries whose steps the run has not given up: no later start has continued from an earlier step."""
    found: list[Entry] = []
    for entry in entries:
        if entry.kind == "start":
            found = [one for one in found if one.step <= entry.step]
        found.append(entry)
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
