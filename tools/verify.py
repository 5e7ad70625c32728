"""Compare a run with its record: every file, a replay of its steps, and what it has seen. scripts/verify.py is the command.

The record (training/record.py) holds together by itself. What it says is compared with what is there; a replay trains again
and compares what comes out. docs/verify.md says what each of these proves.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common.durable_files import SUFFIX
from common.errors import UserError
from common.sha256 import sha256, sha256_of_all
from configs.load import config_of
from data.find import Wanted, find, wanted_by
from distributed.checkpoint_directory import (
    MANIFEST,
    SET_ASIDE,
    CheckedFile,
    checkpoint_name,
    read_manifest,
    set_latest,
)
from distributed.tensor_digest import digest_of, parts_of
from tools.chaos import read_rows
from training.ending import ADAPTER_DIRECTORY
from training.ending import RECORD as EXPORT
from training.identity import differences
from training.record import FILE, METRICS, Entry, Record, not_given_up, plan_after

ROOT = Path(__file__).resolve().parents[1]
EXACT, NOT_EXACT = 0, 3  # exit codes of a replay that differs nowhere, and of one that may differ


class Differs(Exception):
    """Something is not what the record says. The message is one sentence that names the file, the entry and the step."""


# ---- Files ---------------------------------------------------------------------------------------------------------------


def read_record(run: Path) -> list[Entry]:
    """The entries of the record. Raises Differs where its chain is broken, and UserError if there is none."""
    record = Record(run)
    try:
        entries = record.read()
    except UserError as error:
        raise Differs(str(error)) from error
    if not entries:
        raise UserError(f"{run} has no {FILE} with an entry; name the directory of a run, such as runs/quickstart")
    return entries


def check_files(run: Path, entries: list[Entry], head: str | None) -> Iterator[str]:
    """Compare everything with the record, and yield a line about each part. Raises Differs at the first difference."""
    yield check_head(run, entries, head)
    yield check_starts(run, entries)
    yield check_metrics(run, entries)
    yield check_checkpoints(run, entries)
    yield from check_exports(run, entries)
    yield check_inputs([entry for entry in entries if entry.kind == "start"][-1:])


def check_head(run: Path, entries: list[Entry], head: str | None) -> str:
    """Compare the head with one that was kept elsewhere, of which 16 digits or more are given."""
    line = f"record: {len(entries)} entries hold each other, head {entries[-1].digest}"
    if head is None:
        return f"{line}; only --head with a copy that was kept elsewhere shows that the record was not written anew"
    if not re.fullmatch("[0-9a-f]{16,64}", head := head.lower()):
        raise UserError(f"--head {head}: give 16 to 64 hexadecimal digits")
    entry = next((entry for entry in entries if entry.digest.startswith(head)), None)
    if entry is None:
        raise Differs(
            f"{run / FILE}: no entry has the head {head}: an entry was changed, or entries at the end were dropped"
        )
    later = len(entries) - entry.number
    return f"{line}; {head} is the head after {entry}" + (f", and {later} entries came later" if later else "")


def check_starts(run: Path, entries: list[Entry]) -> str:
    """config.json and the differences of the code from the commit."""
    starts = [entry for entry in entries if entry.kind == "start"]
    for entry in starts:
        for name, digest in entry.content["written"].items():
            if name != "config.json" or entry is starts[-1]:
                _compare(run / name, digest, entry)
    last = starts[-1].content
    return (
        f"starts: {len(starts)}, the last by {last['started_by']}, approved by {last['approved_by'] or 'nobody'}, on "
        f"{last['world_size']} ranks of {last['processor']}"
    )


def check_metrics(run: Path, entries: list[Entry]) -> str:
    """The rows of curves. A start cuts them down and says what is left, so that only entries from the last one on count."""
    path = run / METRICS
    content = path.read_bytes() if path.is_file() else b""
    last = [entry for entry in entries if entry.kind == "start"][-1].number
    good, end = 0, 0
    for entry in not_given_up(entries):
        if "metrics" not in entry.content:
            continue
        size, digest = entry.content["metrics"]["bytes"], entry.content["metrics"]["sha256"]
        if hashlib.sha256(content[:size]).hexdigest() == digest:
            good, end = max(good, size), max(end, size)
        elif entry.number >= last:
            steps = [json.loads(row)["step"] for row in content[good:size].splitlines() if _is_row(row)]
            where = f"a row from step {min(steps)} to {max(steps)}" if steps else "its end"
            raise Differs(f"{path} is not what {entry} says: {where} was changed, added or removed")
    rows, rest = content.count(b"\n", 0, end), content.count(b"\n", end)
    if rest and entries[-1].kind in ("stop", "export", "certificate"):
        raise Differs(f"{path}: {rest} rows at its end are in no entry, and the run had ended at {entries[-1]}")
    return f"{METRICS}: {rows} rows" + (f", and {rest} after the last entry, which a kill has left" if rest else "")


def check_checkpoints(run: Path, entries: list[Entry]) -> str:
    """Every checkpoint that is there, all bytes of it, and whether one is missing."""
    folder, kept = run / "checkpoints", [entry for entry in not_given_up(entries) if entry.kind == "checkpoint"]
    checked, left = [], []
    for path in sorted(folder.glob("step-*")):
        if not path.is_dir() or path.name.endswith(SUFFIX):
            continue
        name = path.name.removesuffix(SET_ASIDE)
        every = [one for one in entries if one.kind == "checkpoint" and checkpoint_name(one.step) == name]
        if not every:
            raise Differs(f"{path} is named by no entry of {FILE}")
        current = [one for one in every if one in kept]
        if not current or path.name != name:
            left.append(path.name)  # the run does not continue from it
            continue
        found = sha256(path / MANIFEST) if (path / MANIFEST).is_file() else "missing"
        entry = next((one for one in current if one.content["manifest"] == found), None)
        if entry is None:
            raise Differs(f"{path / MANIFEST} is not the one of {current[-1]}: it was changed, or is of another run")
        _check_checkpoint(path, entry)
        checked.append(path.name)
    for entry in {entry.step: entry for entry in kept}.values():
        name, later = checkpoint_name(entry.step), entries[entry.number :]
        gone = [one for one in later if name in one.content.get("removed", []) + one.content.get("set_aside", [])]
        if name not in checked and not gone:
            raise Differs(f"{folder / name} is missing: {entry} names it, and no entry says that it was removed")
    aside = f"; not looked at, because the run has given them up: {', '.join(left)}" if left else ""
    return f"checkpoints: {len(checked)} whole, {len({entry.step for entry in kept}) - len(checked)} removed{aside}"


def _check_checkpoint(path: Path, entry: Entry) -> None:
    try:
        manifest = read_manifest(path)
        for name, sums in manifest["files"].items():
            with CheckedFile(path / name, sums, f"{entry} names it") as file:
                file.check()
    except UserError as error:
        raise Differs(f"{error} ({entry})") from error
    reader = dcp.FileSystemReader(path)
    parts = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata) and not name.startswith("random."):
            tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load({name: tensor}, storage_reader=dcp.FileSystemReader(path), no_dist=True)
            parts |= parts_of({name: tensor})
    if digest_of([parts], manifest["values"]) != entry.content["tensors"]:
        raise Differs(f"the tensors of {path} are not those of {entry}")


def check_exports(run: Path, entries: list[Entry]) -> Iterator[str]:
    """The newest export in each directory."""
    exports = {entry.content["directory"]: entry for entry in entries if entry.kind == "export"}
    own = run / "export"
    if own.exists() and own.name not in exports:
        raise Differs(f"{own} is named by no entry of {FILE}")
    for name, entry in exports.items():
        folder = run / name  # an absolute name stands for itself
        if not folder.exists() and folder != own:
            yield f"export {folder}: not here, so not compared"
            continue
        _compare(folder / EXPORT, entry.content["sha256"], entry)
        written = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        if written["record"] not in [one.digest for one in entries[: entry.number - 1]]:
            raise Differs(f"{folder / EXPORT} carries a head that no entry before {entry} has")
        sums = {folder / file: digest for file, digest in written["files"].items()}
        sums |= {run / ADAPTER_DIRECTORY / file: digest for file, digest in written.get("adapter", {}).items()}
        for path, digest in sums.items():
            _compare(path, digest, entry)
        yield f"export {folder}: {len(sums)} files, the {written['weights']} weights of step {entry.step}"


def check_inputs(starts: Sequence[Entry]) -> str:
    """What the last start has read: the base with its tokenizer, and all data. Files that are not here are not compared."""
    away, count = 0, 0
    for entry in starts:
        wanted = {path: (part, sums[path]) for part, sums in entry.content["files"].items() for path in sums}
        here = [path for path in map(Path, wanted) if path.is_file()]
        away, count = away + len(wanted) - len(here), count + len(here)
        for path, found in sha256_of_all(here).items():
            part, digest = wanted[str(path)]
            if found != digest:
                raise Differs(f"{path} ({part}) is not what {entry} has read: its SHA-256 is another one")
    return f"base and data: {count} files" + (f"; {away} are not here, so not compared" if away else "")


def _compare(path: Path, digest: str, entry: Entry) -> None:
    if not path.is_file():
        raise Differs(f"{path} is missing: {entry} names it")
    if sha256(path) != digest:
        raise Differs(f"{path} is not what {entry} says: its SHA-256 is another one")


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError):
        return False


# ---- Replay --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """Steps that one start has trained: from the checkpoint of step `first`, or the base, to the last of `checkpoints`."""

    start: Entry
    first: int
    checkpoints: list[Entry]


def segments(entries: list[Entry], step: int | None) -> list[Segment]:
    """What is trained again: from the checkpoint of `step` to the next one; None: all steps, start by start."""
    found: list[Segment] = []
    for entry in not_given_up(entries):
        if entry.kind == "start":
            found.append(Segment(entry, entry.step, []))
        elif entry.kind == "checkpoint" and entry.step > found[-1].first:
            found[-1].checkpoints.append(entry)
    found = [segment for segment in found if segment.checkpoints]
    if step is None:
        return found
    for segment in found:
        later = [entry for entry in segment.checkpoints if entry.step > step]
        if later and segment.first <= step:
            return [Segment(segment.start, step, [one for one in later if one.step == later[0].step])]
    steps = sorted({segment.first for segment in found} | {one.step for part in found for one in part.checkpoints})
    raise UserError(f"--replay {step}: no later checkpoint follows it; choose one of {', '.join(map(str, steps[:-1]))}")


def run_train(command: list[str], directory: str, environment: dict[str, str]) -> tuple[int, str]:
    """(exit code, output) of a training. Tests put another one here."""
    done = subprocess.run(command, cwd=directory, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def replay(run: Path, entries: list[Entry], step: int | None, say: Callable[[str], None]) -> int:
    """Train the steps from the checkpoint `step` to the next one again, or all steps (None), and compare the bits.

    Returns the exit code: EXACT, or NOT_EXACT where this machine cannot be expected to give the same bits. Raises Differs.
    """
    chosen, code = segments(entries, step), EXACT
    with tempfile.TemporaryDirectory(prefix="replay-", dir=run.parent) as folder:
        again = Path(folder, run.name)
        for segment in chosen:
            check_inputs([segment.start])
            if segment is chosen[0] and segment.first:
                _copy_state(run, entries, segment.first, again)
            _train_again(segment, again, say)
            code = max(code, _compare_segment(segment, run, again, say))
    return code


def _copy_state(run: Path, entries: list[Entry], step: int, again: Path) -> None:
    """What a start finds that continues from the checkpoint of `step`."""
    checkpoint = run / "checkpoints" / checkpoint_name(step)
    named = [entry for entry in not_given_up(entries) if entry.kind == "checkpoint" and entry.step == step]
    if not named or not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not there any more; replay from another step, or all steps: --replay all")
    copied = again / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, copied)
    set_latest(copied.parent, copied)
    lines = (run / FILE).read_bytes().split(b"\n")[: named[-1].number]
    (again / FILE).write_bytes(b"\n".join(lines) + b"\n")
    (again / METRICS).write_bytes((run / METRICS).read_bytes()[: named[-1].content["metrics"]["bytes"]])
    if (run / "ewc").is_dir():
        shutil.copytree(run / "ewc", again / "ewc")


def _train_again(segment: Segment, again: Path, say: Callable[[str], None]) -> None:
    """Start train.py with the recorded config, ranks and threads, in another run directory. Raises Differs if it fails."""
    start, last = segment.start.content, segment.checkpoints[-1].step
    every = math.gcd(*(entry.step for entry in segment.checkpoints))
    config = json.loads(json.dumps(start["config"]))
    config["run"] |= {"directory": str(again.parent), "name": again.name, "stop_at": last, "save_every": every}
    config["run"] |= {"save_minutes": 0.0, "keep_last": 1, "async_save": False, "log_to": [], "profile": None}
    if config["run"]["resume"] in ("never", "previous"):
        config["run"]["resume"] = "auto"
    file = again.parent / "config.py"
    text = (
        f"import json\n\nfrom configs.load import config_of\n\nconfig = config_of(json.loads({json.dumps(config)!r}))\n"
    )
    file.write_text(text, encoding="utf-8")
    script, directory = Path(start["directory"], start["command"][0]), start["directory"]
    if not script.is_file() or not Path(directory).is_dir():
        script, directory = ROOT / "train.py", str(Path.cwd())
    ranks = start["world_size"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(script), str(file)]
    where = f"steps {segment.first + 1} to {last} on {ranks} ranks with {start['threads']} threads"
    say(f"training {where} again, by {segment.start}")
    code, output = run_train(command, directory, {"OMP_NUM_THREADS": str(start["threads"])})
    if code:
        lines = [line for line in output.splitlines() if "rror" in line] or output.splitlines()
        raise Differs(f"{where} could not be trained again (exit code {code}): {lines[-1] if lines else 'no output'}")


def _compare_segment(segment: Segment, run: Path, again: Path, say: Callable[[str], None]) -> int:
    """Compare identity, plan, tensors and curves. Returns the exit code. Raises Differs."""
    recorded, entries = segment.start.content, read_record(again)
    now = [entry for entry in entries if entry.kind == "start"][-1].content
    last = segment.checkpoints[-1].step
    if found := differences(recorded["identity"], now["identity"]):
        raise Differs(f"{segment.start} cannot be replayed here: it was made with {'; '.join(found)}")
    other = [
        f"{name} {recorded[name]}, here {now[name]}" for name in ("processor", "threads") if recorded[name] != now[name]
    ]
    kinds, here = ({place["device"] for place in start["devices"]} for start in (recorded, now))
    other += [f"{', '.join(sorted(kinds))}, here {', '.join(sorted(here))}"] if kinds != here else []
    on_cuda = not all(kind.startswith("cpu") for kind in kinds | here)
    other += ["CUDA without run.deterministic"] if on_cuda and not recorded["config"]["run"]["deterministic"] else []
    problem = None
    for entry in segment.checkpoints:
        found = [one for one in entries if one.kind == "checkpoint" and one.step == entry.step]
        if not found:
            raise Differs(f"the replay has saved nothing at step {entry.step}, where {entry} is")
        if found[-1].content["plan"] != entry.content["plan"]:
            raise Differs(
                f"the documents of the steps up to {entry.step} are not those of {entry}: the data have changed"
            )
        if found[-1].content["tensors"] != entry.content["tensors"] and problem is None:
            problem = f"the tensors after step {entry.step} are not those of {entry}"
    before, after = (_rows_of(path, segment) for path in (run, again))
    both = sorted(before.keys() & after.keys())
    if differing := [key for key in both if before[key] != after[key]]:
        (step, kind), rest = differing[0], f"; {problem}" if problem else ""
        problem = f"the {kind} curves of step {step} in {run / METRICS} are not those that the replay gives{rest}"
    steps = f"steps {segment.first + 1} to {last}: the tensors of {len({entry.step for entry in segment.checkpoints})} checkpoints"
    if problem is None:
        say(f"{steps} and {len(both)} rows of curves are equal to the bit")
        return EXACT
    if not other:
        raise Differs(problem)
    pairs = [
        abs(values[name] - after[key][name])
        for key, values in before.items()
        for name in values
        if "loss" in name and isinstance(values[name], float) and isinstance(after.get(key, {}).get(name), float)
    ]
    say(
        f"{steps} are not equal to the bit, as may be: {'; '.join(other)}; the largest difference of {len(pairs)} losses is "
        f"{max(pairs, default=math.nan):.3g}"
    )
    return NOT_EXACT


def _rows_of(run: Path, segment: Segment) -> dict[tuple[int, str], dict]:
    """The rows of the steps of a segment, but for what a machine measures. A row of means begins after the segment does."""
    found, before = {}, 0
    for (step, kind), values in read_rows(run):
        before = max(before, segment.start.step) if step > segment.start.step else before
        is_inside = before >= segment.first if kind == "train" else step > segment.first or not segment.first
        before = step if kind == "train" else before
        if is_inside and segment.first <= step <= segment.checkpoints[-1].step:
            found[step, kind] = values
    return found


# ---- What a run has seen -------------------------------------------------------------------------------------------------


def seen(entries: list[Entry], what: str) -> Iterator[str]:
    """Lines about the examples that a run was trained on and that `what` names: which they are, in which steps, on which ranks.

    what: a file of examples, ids or hashes; a hash; an id; or a text that they contain. No line has the text of an example.
    Raises Differs if the data are not those of the record.
    """
    from tools.check_step import read_run  # loads transformers' models

    history = not_given_up(entries)
    starts = [entry for entry in history if entry.kind == "start"]
    steps_of: dict[str, list[str]] = {}
    shown: dict[str, str] = {}
    path = Path(what).absolute() if os.path.isfile(what) else None
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        mine = [
            entry
            for entry in history
            if entry.number >= start.number and (not following or entry.number < following.number)
        ]
        content, last = start.content, following.step if following else max(entry.step for entry in mine)
        with contextlib.chdir(content["directory"]):
            config = config_of(content["config"])
            inputs = read_run(config, content["world_size"], torch.device("cpu"), ROOT / "train.py").inputs
            assert inputs.local
            wanted = wanted_by(path, inputs.local.data) if path else _called(what)
            found = list(find(inputs.train, inputs.local.data, wanted))
        plan, sources = content["plan"], [source.fingerprint for source in inputs.train.sources]
        digests = {item: one.digest for one in found for item in one.items}
        shown |= {one.digest: one.where for one in found}
        for step in range(start.step, last):
            batch = inputs.plan.batch(step)
            plan = plan_after(plan, step + 1, sources, batch.items)
            if wrong := [one for one in mine if one.step == step + 1 and one.content.get("plan", plan) != plan]:
                raise Differs(
                    f"the documents of the steps up to {step + 1} are not those of {wrong[0]}: the data have changed"
                )
            if digests.keys().isdisjoint(batch.items):
                continue
            for micro_batch in inputs.deal(step).items:
                for rank, items in enumerate(micro_batch):
                    for digest in {digests[item] for item in items if item in digests}:
                        steps_of.setdefault(digest, []).append(f"{step + 1} (rank {rank})")
    for digest, where in shown.items():
        yield f"{digest} | {where} | " + (
            f"steps {', '.join(steps_of[digest])}" if digest in steps_of else "in no step"
        )
    yield f"{len(shown)} examples of the training data, {len(steps_of)} of them in a step of the {last} that the model has taken"


def _called(what: str) -> Wanted:
    if re.fullmatch("[0-9a-f]{32}", what):
        return Wanted(hashes=frozenset([what]))
    return Wanted(ids=frozenset([what]), text=what)
