"""The saved state of a run: its checkpoints, and the record of its history. Both are written and verified here.

A checkpoint holds the tensors that `distributed.checkpoint.Saver` saves. Its manifest holds the loop's `state`, the state of
the evaluations, and the run's identity and other settings (training/identity.py).

runs/NAME/record.jsonl is the record: entries that nobody can change without a trace (docs/check.md). Entry N is line N, a JSON
object with `entry` N, the SHA-256 of the line before it in `previous`, its `kind` and its `time`; the first one also has the
`format` of the file. The SHA-256 of the last line is the head of the record. An entry holds SHA-256 digests of its subject: a
start hashes the parts of the identity and all files that were read, a checkpoint its manifest and its tensors, an export its
export.json. Entries during the run also hold the hashes of the plan and of the curves so far. An entry `prepared` lists the
files that the base model has made before the first step.

`plan`: after step s it is the SHA-256 of its previous value, of s and of the documents of step s. A document is named by its
number in its source and by the fingerprint of all tokens of that source. `metrics`: the SHA-256 of the first bytes of
metrics.jsonl.

An entry is written before its checkpoint or export is renamed to its final name, or away from it, so everything that a kill
leaves under a final name has an entry. No entry holds text of the data.
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
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from common.durable_files import fsync
from common.errors import UnknownFormat, UserError
from common.sha256 import sha256
from data.batches import StepBatch
from data.dealing import Items
from data.sources import Corpus
from distributed.checkpoint import Saver, SaveTimes, is_plain
from distributed.checkpoint_directory import (
    MANIFEST,
    SET_ASIDE,
    checkpoint_name,
    complete_checkpoints,
    find_checkpoint,
    read_manifest,
    set_aside_after,
    step_of,
)
from distributed.process_group import Ranks, read_on_first
from model.weight_digests import remembered_sha256
from training.evaluations import SAVED, Evaluations
from training.identity import check_identity
from training.timestamp import stamp

if TYPE_CHECKING:
    from training.start import TrainingRun

FILE, METRICS = "record.jsonl", "metrics.jsonl"
FORMAT = 1  # of the record
PREPARED = ("anchor", "ewc")  # directories beside it (training/anchor.py, model/ewc.py)
SAVE = re.compile(rb'\{"step": \d+, "save/pause_seconds": [\d.e-]+, "save/total_seconds": [\d.e-]+\}')  # a row
AGAIN = "restore the file, or choose another run.name"


# ---- The record ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A line of the record. `digest` is the SHA-256 of its bytes without the line end, `content` the whole JSON object."""

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
        """Append an entry durably and return the new head. A last line that a kill cut off is removed first.

        The head is sent to run.timestamp of the newest start. Raise UserError if the file cannot be written.
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
                entry |= {} if lines else {"format": FORMAT}
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
        starts = (json.loads(row) for row in [line, *reversed(lines)] if b'"kind": "start"' in row)
        config = next((start.get("config", {}) for start in starts if start["kind"] == "start"), {})
        if target := config.get("run", {}).get("timestamp"):
            stamp(target, self.directory, entry["entry"], line, _sha256(line))
        return _sha256(line)

    def read(self) -> list[Entry]:
        """Return all entries; none before the first start.

        A last line without its end was being written when the process died, and is ignored. Raise UserError where the chain
        is broken, and UnknownFormat for a record of another format.
        """
        content = self.path.read_bytes() if self.path.is_file() else b""
        entries, previous = [], ""
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                kind, claimed, before = entry["kind"], entry["entry"], entry["previous"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{self.path}, line {number} is not an entry of a record; {AGAIN}") from error
            if claimed != number or before != previous:
                raise UserError(
                    f"{self.path}: entry {claimed} in line {number} does not follow the line before it; one of the two was "
                    f"changed, or an entry was dropped, inserted or moved; {AGAIN}"
                )
            if number == 1 and entry.get("format") != FORMAT:
                raise UnknownFormat(
                    f"{self.path} has format {entry.get('format')}, and this version of the code reads format {FORMAT}; use the "
                    "version that wrote it, or choose another run.name"
                )
            previous = _sha256(line)
            entries.append(Entry(number, kind, previous, entry))
        return entries

    def named(self, step: int, manifest: str, entries: list[Entry] | None = None) -> Entry:
        """Return the newest entry about the checkpoint of `step`, whose manifest.json has the SHA-256 `manifest`.

        entries: from `not_given_up`, if they have been read already. Raise UserError if no entry about this step has this
        SHA-256.
        """
        counted = not_given_up(self.read()) if entries is None else entries
        of_step = [entry for entry in counted if entry.kind == "checkpoint" and entry.step == step]
        if manifest not in [entry.content["manifest"] for entry in of_step]:
            raise UserError(
                f"{self.path} has no entry about the checkpoint of step {step} as it is: another run has made it, or it was "
                f"changed; {AGAIN}"
            )
        return of_step[-1]

    def torn(self) -> bool:
        """Return whether a kill has cut off the last line."""
        return self.path.is_file() and self.path.read_bytes()[-1:] not in (b"", b"\n")

    def head(self) -> str:
        """Return the SHA-256 of the last entry; an empty text before the first. Raise UserError as `read` does."""
        entries = self.read()
        return entries[-1].digest if entries else ""


def newest_start(directory: Path) -> dict:
    """Return the content of a run's config.json, which describes its newest start; empty before the first start."""
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


class RunRecord(Record):
    """The record of a run that is training, on all ranks, with running hashes of the plan and the curves up to this step."""

    def __init__(self, directory: Path, corpus: Corpus, ranks: Ranks) -> None:
        super().__init__(directory)
        self.ranks, self.sources = ranks, [source.fingerprint for source in corpus.sources]
        self.plan, self.step = "", 0
        self.metrics, self.size = hashlib.sha256(), 0  # on rank 0

    def continue_from(self, step: int, manifest: str | None, kept: Callable[[], bytes]) -> list[str]:
        """Restore the running hashes after the checkpoint of `step`, and verify the files of the run. Return messages.

        manifest: the SHA-256 of the checkpoint's manifest.json; None if the run starts from the base model, where only the
        chain is verified. kept: returns the rows of metrics.jsonl that will not be written again. Every rank must call this.
        Raise UserError if anything does not verify.
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
            removed = {
                name for entry in entries for key in ("removed", "set_aside") for name in entry.content.get(key, ())
            }
            saved = [
                checkpoint_name(entry.step) for entry in history if entry.kind == "checkpoint" and entry.step > step
            ]
            if lost := [name for name in saved if name not in removed and not (folder / name).exists()]:
                lines.append(
                    f"warning: {folder / lost[-1]}, which {FILE} names, is not there: its steps are trained again"
                )
            if manifest is None:
                return "", lines
            named = self.named(step, manifest, history)
            for path in complete_checkpoints(folder):
                if step_of(path) < step:  # it may be exported as the best one, or by a budget
                    self.named(step_of(path), sha256(path / MANIFEST), history)
            with_rows = [entry for entry in entries if entry.kind in ("start", "checkpoint", "stop")]
            newest = [entry for entry in with_rows if entry.step == step][-1]
            content = (self.directory / METRICS).read_bytes() if (self.directory / METRICS).is_file() else b""
            hashed, rows = newest.content["metrics"], kept()
            later = content[hashed["bytes"] :].splitlines()
            # After a kill, ignore rows that are dropped now and rows of saves in the background.
            if newest.kind != "stop":
                left = set(rows.splitlines())
                later = [line for line in later if line in left and not SAVE.fullmatch(line)]
            is_whole = _sha256(content[: hashed["bytes"]]) == hashed["sha256"] and not later
            # The rows are dropped after the entry of a start: a kill may have come in between.
            if not is_whole and _sha256(rows) != hashed["sha256"]:
                raise UserError(
                    f"{self.directory / METRICS} is not what {newest} of {FILE} says: a row up to step {step} was changed or "
                    f"added; {AGAIN}"
                )
            return named.content["plan"], lines

        self.step = step
        self.plan, lines = read_on_first(check, self.ranks)
        return lines

    def start(self, rows: bytes, **content: Any) -> str:
        """Append the entry of this start, before metrics.jsonl is cut down to `rows`; return the head. For rank 0 alone."""
        self.metrics, self.size = hashlib.sha256(rows), len(rows)
        return self.append("start", **self._state(), **content)

    def add_prepared(self, folder: str) -> None:
        """Record the files in `folder`, a name from PREPARED, unless the record has them already. Every rank must call this."""

        def new() -> dict[str, str]:
            sums = self._prepared(folder)
            return {} if sums == prepared_in(self.read(), folder) else sums

        if sums := read_on_first(new, self.ranks):
            self.add("prepared", folder=folder, files=sums)

    def _prepared(self, folder: str) -> dict[str, str]:
        """Return the SHA-256 of each file in `folder`, by name."""
        paths = sorted((self.directory / folder).glob("*"))
        return {path.name: digest for path, digest in remembered_sha256(paths).items()} if paths else {}

    def add_step(self, step: int, batch: StepBatch) -> None:
        """Extend the hash of the plan by a finished step. `step` counts finished steps; the last one took `batch`."""
        self.plan, self.step = plan_after(self.plan, step, self.sources, batch.items), step

    def so_far(self) -> dict:
        """Return step, plan and curves up to now, as an entry holds them. Every rank must call this.

        Raise UserError on all ranks if rank 0 cannot read its curves.
        """

        def read() -> dict:
            path = self.directory / METRICS
            if path.is_file():
                with path.open("rb") as file:
                    file.seek(self.size)
                    new = file.read()
                    os.fsync(file.fileno())  # the entry is durable, and so must its rows be
                self.metrics.update(new)
                self.size += len(new)
            return self._state()

        return read_on_first(read, self.ranks)

    def evaluation(self, figures: dict[str, Any]) -> None:
        """Append the numbers of an evaluation. Texts, such as a sample of the answers, stay out. Every rank must call this."""
        self.add("evaluation", figures={name: value for name, value in figures.items() if not isinstance(value, str)})

    def add(self, kind: str, **content: Any) -> str:
        """Append an entry about the steps so far with `content`, and return the head. Every rank must call this.

        Raise UserError on all ranks if the file cannot be written.
        """
        so_far = self.so_far()
        return read_on_first(lambda: self.append(kind, **so_far, **content), self.ranks)

    def _state(self) -> dict:
        metrics = {"bytes": self.size, "sha256": self.metrics.hexdigest()}
        return {"step": self.step, "plan": self.plan, "metrics": metrics}


def plan_after(plan: str, step: int, sources: list[str], items: Items) -> str:
    """Return the hash of the plan after `step` steps from its previous value, the sources' fingerprints and the step's items."""
    return _sha256(repr((plan, step, sources, items)).encode())


def prepared_in(entries: list[Entry], folder: str) -> dict[str, str]:
    """Return file name -> SHA-256 from the last entry `prepared` about `folder`, a name from PREPARED."""
    prepared = [entry for entry in entries if entry.kind == "prepared" and entry.content["folder"] == folder]
    return prepared[-1].content["files"] if prepared else {}


def not_given_up(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries whose steps still count: no later start has continued from an earlier step."""
    counted: list[Entry] = []
    for entry in entries:
        if entry.kind == "start":
            counted = [earlier for earlier in counted if earlier.step <= entry.step]
        counted.append(entry)
    return counted


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- The checkpoints -----------------------------------------------------------------------------------------------------


class Checkpointer:
    """Finds, loads and saves the checkpoints of one run, and keeps its record. Every rank must call each of its methods.

    Call `find` first, then `save_from`, `register` and `load`.
    """

    saver: Saver  # from `save_from` on

    def __init__(self, run: "TrainingRun", evaluations: Evaluations) -> None:
        """Read and write no file yet."""
        self.directory, self.options, self.stop = run.directory / "checkpoints", run.config.run, run.stop
        self.identity, self.settings, self.evaluations = run.identity, run.settings, evaluations
        self.record = RunRecord(run.directory, run.data.train, run.stop.ranks)
        self.causal_lm = run.model.causal_lm
        # The identity that trained the current weights. From its first step on, this is the identity of this start.
        self.trained_as = run.identity
        self.resume_from: Path | None = None
        self.saved_step = self.saved_updates = 0  # of the newest checkpoint; 0: the base model
        self.saved_at = 0.0  # on rank 0's clock: of the last save, or of the first step of this start
        self.proven_step = 0  # the newest checkpoint from which a finite loss and gradient norm have been computed

    def find(self, state: dict, total_steps: int, kept_rows: Callable[[int, dict[str, int]], bytes]) -> list[str]:
        """Restore `state` and the evaluations from the newest checkpoint. Return messages for the user.

        kept_rows: `Log.kept`, which returns the rows of metrics.jsonl that will not be written again.
        Raise UserError if the checkpoint is damaged, has another identity, is beyond `total_steps`, or differs from the
        record of the run.
        """
        ranks, num_sources = self.stop.ranks, len(state["targets"])
        checkpoint, passed_over = find_checkpoint(self.directory, self.options.resume, ranks)
        lines = [f"warning: passed over and renamed to NAME{SET_ASIDE}: {problem}" for problem in passed_over]
        saved = read_on_first(lambda: read_manifest(checkpoint)["state"] if checkpoint else None, ranks)
        if not checkpoint or not saved:
            export, aside = self.directory.with_name("export"), f"step-*{SET_ASIDE}"
            if read_on_first(lambda: export.exists() and not list(self.directory.glob(aside)), ranks):
                raise UserError(
                    f"{export} exists, but the checkpoints of its run are gone; to train again from the base model, choose "
                    f"another run.name or remove {export.parent}"
                )
            return lines + self.record.continue_from(0, None, bytes)
        self.identity, changes = check_identity(checkpoint, saved, self.identity, self.settings, self.options.resume)
        self.trained_as = saved["identity"]
        if saved["step"] > total_steps:
            raise UserError(
                f"{checkpoint} is at step {saved['step']}, beyond the {total_steps} steps of this config; raise "
                "optimizer.max_steps or optimizer.epochs, or choose another run.name"
            )
        counted = saved["loop"]
        state |= {key: counted[key] for key in state if key in counted}
        if self.is_changed:
            state["bad_steps_in_a_row"] = 0  # the new settings, such as a lower rate, get the full number of tries
            if self.trained_as["the data"]["data.mix"] != self.identity["the data"]["data.mix"]:
                state["targets"] = [0] * num_sources  # the old counts belong to other sources
        changes += self.evaluations.load_state_dict(saved)
        self.saved_step, self.saved_updates = saved["saved_step"], saved["saved_updates"]
        self.proven_step, self.resume_from = saved["proven_step"], checkpoint
        manifest = read_on_first(lambda: sha256(checkpoint / MANIFEST), ranks)
        lines += self.record.continue_from(
            saved["step"], manifest, lambda: kept_rows(saved["step"], saved["evaluated"])
        )
        if passed_over:  # else the next start would find the damaged one again
            read_on_first(lambda: set_aside_after(self.directory, saved["step"], self.record.append, "damaged"), ranks)
        return lines + changes

    @property
    def is_changed(self) -> bool:
        """Whether this start continues a run of another identity (run.resume=changed)."""
        return self.trained_as != self.identity

    def save_from(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Load and save these parameters and this optimizer from now on. Call this right after the optimizer is made."""
        options = self.options.keep_last, self.options.async_save, self.options.timeout_minutes, self.record.append
        self.saver = Saver(self.directory, parameters, optimizer, self.stop.ranks, *options)
        from model.language_model import (  # tools that read records do without
            BUFFERS,
            PersistentBuffers,
            persistent_buffers,
        )

        if persistent_buffers(self.causal_lm):  # no optimizer steps them, but a resume may not read the base's files
            self.register(BUFFERS, PersistentBuffers(self.causal_lm))

    def register(self, name: str, stateful: Any) -> None:
        """Save and load anything else that has a state, such as an average of the weights, as `Saver.register` says."""
        self.saver.register(name, stateful)

    def load(self, state: dict) -> list[str]:
        """Read the tensors of the checkpoint that `find` has chosen, if any, in place. Return messages for the user.

        Raise UserError if the loop's `state` cannot be saved as JSON.
        """
        if wrong := [key for key, value in state.items() if not is_plain(value)]:
            raise UserError(
                f"train.py: state[{wrong[0]!r}] is a {type(state[wrong[0]]).__name__}; use numbers, strings and lists, and "
                "checkpointer.register for tensors"
            )
        return self.saver.load(self.resume_from)

    def is_due(self, step: int) -> bool:
        """Return whether a save is due by steps or by rank 0's clock since the last save: the same on every rank."""
        every, clock = self.options.save_every, self.stop.clock
        self.saved_at = self.saved_at or clock
        by_time = 0 < 60 * self.options.save_minutes <= clock - self.saved_at
        return by_time or (every > 0 and step // every > self.saved_step // every)

    def save(self, state: dict) -> None:
        """Save the state after the last finished step, unless that step is saved already.

        The rows of metrics.jsonl up to this step are made durable before the checkpoint gets its name.
        """
        if state["step"] <= self.saved_step:
            return
        if state["updates"] > self.saved_updates:  # steps were taken from the previous checkpoint, so it is proven
            self.proven_step = self.saved_step
        self.saved_step, self.saved_updates = state["step"], state["updates"]
        self.saved_at, self.trained_as = self.stop.clock, self.identity
        self.saver.save(self._manifest(state), **self.record.so_far())

    def update(self, state: dict) -> None:
        """If this step has been saved, add the evaluations since then to its saved state."""
        if 0 < state["step"] == self.saved_step:
            self.saver.update_state(self._manifest(state), **self.record.so_far())

    def finished_saves(self) -> list[SaveTimes]:
        """Return the times of the saves that have finished since the last call.

        Raise UserError on all ranks if a save in the background has failed.
        """
        return self.saver.poll()

    def close(self) -> list[SaveTimes]:
        """Wait until everything is durable, and return the times of the saves that `finished_saves` has not returned."""
        return self.saver.close()

    def give_up(self, what: str, updates: int) -> NoReturn:
        """Set aside the checkpoints after the newest one that is known to be good, and raise UserError.

        A checkpoint is known to be good when a finite loss has been computed from its weights.
        """
        self.saver.wait()
        good = self.saved_step if updates > self.saved_updates else self.proven_step
        renamed = read_on_first(
            lambda: set_aside_after(self.directory, good, self.record.append, what), self.stop.ranks
        )
        aside = (
            f"; {', '.join(renamed)} in {self.directory} may hold bad weights and will not be used" if renamed else ""
        )
        start = f"the checkpoint of step {good}, which is good" if good else "the base model"
        again = " with run.resume=changed" if good else ""
        raise UserError(
            f"{what}{aside}; lower optimizer.learning_rate, or check the data of these steps, and start again{again}: the "
            f"run continues from {start}"
        )

    def stopped(self, state: dict, total_steps: int) -> str:
        """Return a sentence on the step at which a signal has stopped the run."""
        where = f"stopped after step {state['step']}/{total_steps}"
        if self.saved_step == state["step"]:
            return where + (", saved" if state["step"] else "")
        bad = state["bad_steps_in_a_row"]
        return f"{where}, whose last {bad} steps were skipped; the last saved step is {self.saved_step}"

    def _manifest(self, state: dict) -> dict:
        """Return the saved state of a checkpoint, plain JSON. `prune` and the check of a run read it."""
        return {
            "identity": self.trained_as,
            "settings": self.settings,
            "step": state["step"],
            "loop": state,
            **{name: getattr(self.evaluations, name) for name in SAVED},
            "saved_step": self.saved_step,
            "saved_updates": self.saved_updates,
            "proven_step": self.proven_step,
        }
