"""Compare a run with its record: every file, a replay of its steps, and what it has seen. scripts/verify.py is the command.

docs/check.md says what each of these proves.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import AutoConfig

from common.child_process import last_words
from common.durable_files import SUFFIX, temporary_path
from common.errors import UserError
from common.sha256 import sha256, sha256_of_all
from configs.config import LoRA
from configs.load import config_of
from data.find import called, find, not_found, wanted_by
from data.remote import FETCHED
from distributed.checkpoint_directory import (
    MANIFEST,
    SET_ASIDE,
    CheckedFile,
    checkpoint_name,
    marks_of,
    read_manifest,
)
from model.architectures import first_new_row
from model.language_model import PackedLanguageModel, build_on_meta
from model.lora import PREFIX, WEIGHTS, adapter_of_checkpoint
from model.weight_files import stored_tensors
from model.weights import weights_of_directory
from tools.chaos import read_rows
from tools.launched import ROOT, Launch, torchrun
from training.checkpointer import FILE, METRICS, PREPARED, Entry, Record, not_given_up, plan_after, prepared_in
from training.description import counted
from training.ending import ADAPTER_DIRECTORY, BOM, CARD, EXPORT, SIGNATURE
from training.identity import differences
from training.log import EVALUATIONS

EXACT, NOT_EXACT = 0, 3  # exit codes of a replay
UNFINISHED = "its temporary name: the run is writing it, or has died there, and mends it when it is started again"
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
LATER = (EXPORT, CARD, BOM, SIGNATURE)  # files of an export that export.json does not name
STEP = attrgetter("step")
Say = Callable[[str], None]
Bounds = Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Differs(Exception):
    """Something is not what the record says. The message is one sentence that names the file, the entry and the step."""


# ---- Files ---------------------------------------------------------------------------------------------------------------


def read_record(run: Path) -> list[Entry]:
    """The entries of the record. Raises Differs where its chain is broken, and UserError if there is none."""
    try:
        entries = Record(run).read()
    except UserError as error:
        raise Differs(str(error)) from error
    first = next((entry for entry in entries if entry.kind != "exclusion"), None)  # which comes before its start
    if first is None:
        raise UserError(f"{run} has no {FILE} with a start; name the directory of a run, such as runs/quickstart")
    if first.kind != "start":
        raise Differs(f"{run / FILE}: {first} comes before the first start")
    return entries


def compare(run: Path, head: str | None, say: Say) -> list[Entry]:
    """Compare everything with the record, and say a line about each part. Returns the entries. Raises Differs, and UserError.

    A run may be training meanwhile: what differs counts if the record has not grown since it was read.
    """
    while True:
        entries = read_record(run)
        try:
            for line in check_files(run, entries, head):
                say(line)
            say("nothing differs from the record")
            return entries
        except PermissionError:  # what cannot be read may be as recorded
            raise
        except (Differs, OSError, KeyError, IndexError, TypeError, AttributeError, ValueError) as problem:
            if len(read_record(run)) == len(entries):
                is_known = isinstance(problem, Differs | OSError)
                what = str(problem) if is_known else f"{run / FILE} or {EXPORT} is not what a run writes: {problem!r}"
                raise Differs(what) from problem
            say("the run has gone on meanwhile: once more from the beginning")


def check_files(run: Path, entries: list[Entry], head: str | None) -> Iterator[str]:
    """Compare everything with the record, and yield a line about each part. Raises Differs at the first difference."""
    yield _check_head(run, entries, head)
    starts = [entry for entry in entries if entry.kind == "start"]
    for entry in starts:
        for name, digest in entry.content["written"].items():
            if name != "config.json" or (entry is starts[-1] and not _is_before(run / name, starts, entries)):
                _compare(run / name, digest, entry)
    last = starts[-1].content
    by = f"the last by {last['started_by']}, approved by {last['approved_by'] or 'nobody'}"
    yield f"starts: {len(starts)}, {by}, on {counted(last['world_size'], 'rank')} of {last['processor']}"
    yield _check_metrics(run, entries, starts[-1])
    yield _check_checkpoints(run, entries)
    yield from _check_prepared(run, entries)
    # Of several starts from one step the last has trained what counts.
    yield check_inputs(list({one.step: one for one in not_given_up(entries) if one.kind == "start"}.values()))
    yield from _check_exports(run, entries)


def _is_before(config: Path, starts: list[Entry], entries: list[Entry]) -> bool:
    """Whether config.json is that of the start before the last one: a kill came between the entry of a start and its file."""
    if entries[-1] is not starts[-1]:
        return False
    return _is(config, starts[-2].content["written"]["config.json"]) if starts[1:] else not config.exists()


def _check_head(run: Path, entries: list[Entry], head: str | None) -> str:
    line = f"record: {len(entries)} entries hold each other, head {entries[-1].digest}"
    line += ", after which a line was cut off by a kill" if Record(run).torn() else ""
    if head is None:
        return f"{line}; only --head with a copy that was kept elsewhere shows that it was not written anew"
    if not re.fullmatch("[0-9a-f]{16,64}", head := head.lower()):
        raise UserError(f"--head {head}: give 16 to 64 hexadecimal digits")
    entry = next((entry for entry in entries if entry.digest.startswith(head)), None)
    if entry is None:
        raise Differs(
            f"{run / FILE}: no entry has the head {head}: an entry was changed, or entries at the end were dropped"
        )
    later = len(entries) - entry.number
    return f"{line}; {head} is the head after {entry}" + (f", and {later} entries came later" if later else "")


def _check_metrics(run: Path, entries: list[Entry], last: Entry) -> str:
    """A start cuts the rows down and says what is left: entries from the last one on count."""
    path, end, so_far = run / METRICS, 0, hashlib.sha256()
    content = path.read_bytes() if path.is_file() else b""
    told = [(entry.content["metrics"], entry) for entry in entries[last.number - 1 :] if entry.content.get("metrics")]
    for of_entry, entry in sorted(told, key=lambda pair: pair[0]["bytes"]):  # a save in the background is told later
        so_far.update(memoryview(content)[end : of_entry["bytes"]])
        end = of_entry["bytes"]
        if so_far.hexdigest() != of_entry["sha256"]:
            raise Differs(f"{path} is not what {entry} says: a row up to there was changed, added or removed")
    rows, rest = (len(part.splitlines()) for part in (content[:end], content[end:]))  # who reads rows splits them so
    # scripts/export.py may add its entry while the run trains.
    if rest and any(entry.kind == "stop" for entry in entries[last.number :]):
        raise Differs(f"{path}: {rest} rows at its end are in no entry, and the run had ended at {entries[-1]}")
    of_rows = dict(read_rows(run))
    for (step, kind), entry in _evaluations(entries).items():
        row = of_rows.get((step, kind))
        # A kill came before the checkpoint knew of it, and the next start dropped the row.
        is_dropped = row is None and any(one.kind == "start" and one.step == step for one in entries[entry.number :])
        if not is_dropped and (row is None or row | entry.content["figures"] != row):
            raise Differs(f"{path} has not the figures of {entry} in its row of step {step} ({kind})")
    return f"{METRICS}: {rows} rows" + (f", {rest} after the last entry" if rest else "")


def _evaluations(entries: list[Entry]) -> dict[tuple[int, str], Entry]:
    """(step, first word of its curves) -> the newest entry about this evaluation; of steps that the run has not given up."""
    found = [entry for entry in not_given_up(entries) if entry.kind == "evaluation" and entry.content["figures"]]
    return {(entry.step, next(iter(entry.content["figures"])).partition("/")[0]): entry for entry in found}


def _check_checkpoints(run: Path, entries: list[Entry]) -> str:
    """Every checkpoint that is there, all bytes of it, and whether one is missing."""
    folder = run / "checkpoints"
    live, gone = dict[str, list[Entry]](), set[str]()  # name -> entries, if not given up; what was removed since
    for entry in not_given_up(entries):
        gone |= {*entry.content.get("removed", ()), *entry.content.get("set_aside", ())}
        if entry.kind == "checkpoint":
            live.setdefault(checkpoint_name(entry.step), []).append(entry)
            gone.discard(checkpoint_name(entry.step))
    here = {path.name for path in folder.glob("step-*") if path.is_dir() and not path.name.endswith(SUFFIX)}
    known = {checkpoint_name(entry.step) for entry in entries if entry.kind == "checkpoint"}
    known |= {name + SET_ASIDE for entry in entries for name in entry.content.get("set_aside", [])}
    if unknown := sorted(here - known):
        raise Differs(f"{folder / unknown[0]} is named by no entry of {FILE}")
    for name, saved in live.items():
        if name in here:
            _check_checkpoint(folder / name, saved, entries)
    unfinished = [name for name in live if name not in here | gone]
    for name in unfinished:
        entry = live[name][-1]
        if not _is(temporary_path(folder / name) / MANIFEST, entry.content["manifest"]):
            raise Differs(f"{folder / name} is missing: {entry} names it, and no entry says that it was removed")
    whole, left = here & live.keys(), sorted(here - live.keys())  # the run does not continue from these
    line = f"checkpoints: {len(whole)} whole, {len(live) - len(whole) - len(unfinished)} removed"
    line += f"; {', '.join(unfinished)} has {UNFINISHED}" if unfinished else ""
    return line + (f"; not compared, because the run has given them up: {', '.join(left)}" if left else "")


def _check_checkpoint(path: Path, saved: list[Entry], entries: list[Entry]) -> None:
    """Compare all bytes of a checkpoint with the last of its entries `saved`, or with one before it that a kill has left."""
    for entry in saved[::-1]:
        if _is(path / MANIFEST, entry.content["manifest"]):
            break
        after = next((one for one in entries[entry.number :] if one.kind != "export"), None)
        if entry is saved[0] or (after and after.kind != "start"):  # else a kill came before the file was replaced
            raise Differs(f"{path / MANIFEST} is not the one of {saved[-1]}: it was changed, or is of another run")
    try:
        files = read_manifest(path)["files"]

        def check(file: str) -> None:
            with CheckedFile(path / file, files[file], f"{entry} names it") as checked:
                checked.check()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # one core is slower than most disks
            list(pool.map(check, files))
    except UserError as error:
        raise Differs(f"{error} ({entry})") from error
    _refuse_others(path, {MANIFEST, MANIFEST + SUFFIX, *files}, entry)  # a kill may have come before the rename


def _check_prepared(run: Path, entries: list[Entry]) -> Iterator[str]:
    """What the base has made before the first step. A directory that was removed is made again."""
    for folder in [folder for folder in PREPARED if (run / folder).is_dir()]:
        made = [entry for entry in entries if entry.kind == "prepared" and entry.content["folder"] == folder]
        if made:
            _compare_all(run / folder, made[-1].content["files"], made[-1])
        yield f"{folder}: " + (f"{len(made[-1].content['files'])} files" if made else "in no entry, so not compared")


def _check_exports(run: Path, entries: list[Entry]) -> Iterator[str]:
    """The newest export in each directory."""
    every, own = [entry for entry in entries if entry.kind == "export"], run / "export"
    exports = {(run / entry.content["directory"]).resolve(): entry for entry in every}  # one place may have two names
    if own.exists() and own.resolve() not in exports:
        raise Differs(f"{own} is named by no entry of {FILE}")
    for place, entry in exports.items():
        folder, digest = own if place == own.resolve() else place, entry.content["sha256"]
        if not folder.exists() and folder != own:
            yield f"export {folder}: not here, so not compared"
            continue
        if not _is(folder / EXPORT, digest) and _is(temporary_path(folder) / EXPORT, digest):
            yield f"export {folder}: the one of {entry} has {UNFINISHED}"
            continue
        _compare(folder / EXPORT, digest, entry)
        written = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        adapter = written.get("adapter", {})
        _compare_all(folder, written["files"], entry, LATER)
        if adapter:
            _compare_all(run / ADAPTER_DIRECTORY, adapter, entry, LATER)
        if written["head"] not in [one.digest for one in entries[: entry.number - 1]]:
            raise Differs(f"{folder / EXPORT} names the head {written['head']}, which no entry before {entry} has")
        of_step = [one for one in entries[: entry.number] if one.kind == "checkpoint" and one.step == entry.step]
        tensors = [one.content["tensors"] for one in of_step]
        if written["checkpoint"] != entry.content["checkpoint"] or written["checkpoint"] not in tensors:
            raise Differs(f"{folder / EXPORT} is of no checkpoint of step {entry.step} that {FILE} has")
        start = [one.content for one in entries[: entry.number] if one.kind == "start"][-1]
        how = _compare_tensors(run, folder, written, start, entry)
        count = len(written["files"]) + len(adapter)
        yield f"export {folder}: {count} files, the {written['weights']} weights of step {entry.step}, {how}"


def _compare_tensors(run: Path, folder: Path, written: dict, start: dict, entry: Entry) -> str:
    """Compare the tensors of an export with those of its checkpoint, or with their average with the base.

    written: export.json. start: the one that trained the checkpoint. Returns what is said.
    """
    from tools.check_runs import compare_export, registered, trained  # loads the models of transformers

    checkpoint, averaged = run / "checkpoints" / checkpoint_name(entry.step), written.get("averaged") or {}
    base = Path(start["directory"], start["config"]["model"]["path"]) if averaged else None
    is_merged, is_adapter = written.get("adapter") or written.get("kind") == "merged", written.get("kind") == "adapter"
    is_there = marks_of(checkpoint)["checkpoint"] == entry.content["checkpoint"] and (not base or base.is_dir())
    if is_there and not averaged and (is_adapter or written.get("adapter")):
        _compare_adapter(folder if is_adapter else run / ADAPTER_DIRECTORY, checkpoint, entry)
        return "with the adapter of their checkpoint" + (", but merged weights are not compared" if is_merged else "")
    if is_merged or is_adapter or not is_there:
        return "not compared with the tensors of their checkpoint"
    files, share, bounds = stored_tensors(folder), averaged.get("share_of_tuned", 1.0), None
    if base:
        bounds = _bounds(build_on_meta(AutoConfig.from_pretrained(folder)), base, share, "asked" in written)
    found, of = compare_export(folder, checkpoint, trained(checkpoint), bounds), "the tensors"
    for name in registered(checkpoint) if not base and not all(found.values()) else ():
        again = compare_export(folder, checkpoint, trained(checkpoint), of=name)
        if all(again.values()):  # an edited loop exports an average of the weights, say
            found, of = again, name.rstrip(".")
    wrong = sorted(name for name, is_same in found.items() if not is_same)
    wrong += [name for name, one in files.items() if one.dtype != SAFETENSORS[written["dtype"]]]
    if wrong:
        raise Differs(f"{folder}: {wrong[0]} is not what {checkpoint} has, of which {entry} says that it is")
    what = f"averages of the base and {share:g} x the tensors" if base else f"equal to {of}"
    more = len(files.keys() - found.keys())
    return f"{what} of their checkpoint" + (f", but for {more} that were not trained" if more else "")


def _compare_adapter(folder: Path, checkpoint: Path, entry: Entry) -> None:
    """Compare the tensors of an adapter with those of its checkpoint, in the dtype of the adapter's file."""
    kept = adapter_of_checkpoint(checkpoint, LoRA()).weights
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    wrong = sorted(found.keys() ^ kept.shapes.keys())
    wrong = wrong or [name for name, one in found.items() if not torch.equal(one, kept.read(name).to(one.dtype))]
    if wrong:
        raise Differs(f"{folder}: {wrong[0]} is not what {checkpoint} has, of which {entry} says that it is")


def _bounds(model: PackedLanguageModel, base: Path, share: float, is_of_the_run: bool) -> Bounds:
    """(name, trained tensor) -> the tensors between which base + share (tuned - base) lies, whatever has rounded it in fp32.

    is_of_the_run: base and average were rounded to the dtype of the parameters first (training/budget.py).
    """
    weights, new_row = weights_of_directory(base, model), first_new_row(base)

    def bounds(name: str, tuned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        old = weights.read(name)
        old = old.to(tuned.dtype if is_of_the_run else old.dtype).float()
        new = tuned[: len(old)].float()
        mixed, apart = old.lerp(new, share), 2**-21 * torch.maximum(old.abs(), new.abs())
        if new_row is not None and name in weights.vocabulary:
            mixed[new_row:] = new[new_row:]  # rows of new tokens are the tuned ones
        ends = mixed - apart, mixed + apart
        return (ends[0].to(tuned.dtype), ends[1].to(tuned.dtype)) if is_of_the_run else ends

    return bounds


def check_inputs(starts: list[Entry]) -> str:
    """What starts have read: the base with its tokenizer, and all data. Files that are not here are not compared.

    Nor is what a later start has read otherwise, because its file was replaced (run.resume=changed).
    """
    parts = [(start, part, sums) for start in starts for part, sums in start.content["files"].items()]
    wanted = {Path(name): (start, part, sums[name]) for start, part, sums in parts for name in sums}  # the last counts
    here = [path for path in wanted if path.is_file()]
    for path, found in sha256_of_all(here).items():
        start, part, digest = wanted[path]
        if found != digest:
            raise Differs(f"{path} ({part}) is not what {start} has read: its SHA-256 is another one")
    away = len({one for *_, sums in parts for one in sums.items()}) - len(here)
    return f"base and data: {len(here)} files" + (f"; {away} are not here, so not compared" if away else "")


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def _refuse_others(folder: Path, names: set[str], entry: Entry) -> None:
    """What nobody knows may change how a model is loaded. git's own files are let be, as in a signature."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    if others := sorted(name for name in files - names if not name.startswith(".git")):
        raise Differs(f"{folder / others[0]} is named by nothing that {entry} names")


def _compare_all(folder: Path, sums: dict[str, str], entry: Entry, others: Iterable[str] = ()) -> None:
    """Compare all files of a folder. others: names that may be there beside them."""
    for name, digest in sums.items():
        _compare(folder / name, digest, entry)
    _refuse_others(folder, {*sums, *others}, entry)


def _compare(path: Path, digest: str, entry: Entry) -> None:
    if not path.is_file():
        raise Differs(f"{path} is missing: {entry} names it")
    if sha256(path) != digest:
        raise Differs(f"{path} is not what {entry} says: its SHA-256 is another one")


# ---- Replay --------------------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
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
    if step is None:
        return [segment for segment in found if segment.checkpoints]
    for segment in found:
        later = [entry for entry in segment.checkpoints if entry.step > step]
        if later and segment.first <= step:
            return [Segment(segment.start, step, [one for one in later if one.step == later[0].step])]
    raise UserError(f"--replay {step}: the record has no checkpoint after this step of a start that had it")


def run_train(command: list[str], directory: str, environment: dict[str, str]) -> tuple[int, str]:
    """(exit code, output) of a training, of which nothing is left after a signal. Tests put another one here."""
    with tempfile.TemporaryDirectory() as folder:
        with Launch(command, Path(folder, "output"), directory, **environment) as launch:
            return launch.process.wait(), launch.text()


def replay(run: Path, entries: list[Entry], step: int | None, say: Say) -> int:
    """Train the steps from the checkpoint `step` to the next one again, or all steps (None), and compare the bits.

    Returns the exit code: EXACT, or NOT_EXACT where this machine cannot be expected to give the same bits. Raises Differs.
    """
    chosen, code = segments(entries, step), EXACT
    with tempfile.TemporaryDirectory(prefix="replay-", dir=run.parent) as folder:
        again = Path(folder, run.name)
        if step:
            _copy_state(run, entries, step, again)
        for segment in chosen:
            check_inputs([segment.start])
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
    (again / FILE).write_bytes(b"".join((run / FILE).read_bytes().splitlines(keepends=True)[: named[-1].number]))
    (again / METRICS).write_bytes((run / METRICS).read_bytes()[: named[-1].content["metrics"]["bytes"]])
    for folder in PREPARED:  # what the base had made by then; if it has made more since, it makes all of it again
        is_of_then = prepared_in(entries, folder) == prepared_in(entries[: named[-1].number], folder)
        if is_of_then and (run / folder).is_dir():
            shutil.copytree(run / folder, again / folder)


def _train_again(segment: Segment, again: Path, say: Say) -> None:
    """Start train.py with the recorded config, ranks and threads, in another run directory and with an empty token cache.

    Raises Differs if it says that record, data or identity are not those of the run, and UserError if it fails otherwise.
    """
    start, last = segment.start.content, segment.checkpoints[-1].step
    data, cache = start["config"]["data"], again.parent / "tokens"
    if data["cache"] and not cache.exists():
        cache.mkdir()
        if (fetched := Path(start["directory"], data["cache"], FETCHED)).is_dir():
            (cache / FETCHED).symlink_to(fetched)  # these files have been compared
    every = math.gcd(*(entry.step for entry in segment.checkpoints))
    changes = {"directory": str(again.parent), "name": again.name, "stop_at": last, "save_every": every}
    changes |= {"save_minutes": 0.0, "keep_last": 1, "async_save": False, "log_to": [], "profile": None}
    changes |= {"resume": "changed" if start["config"]["run"]["resume"] == "changed" else "auto"}
    data = data | {"cache": data["cache"] and str(cache)}
    config = json.dumps(start["config"] | {"run": start["config"]["run"] | changes, "data": data})
    file = again.parent / "config.py"
    text = f"import json\n\nfrom configs.load import config_of\n\nconfig = config_of(json.loads({config!r}))\n"
    file.write_text(text, encoding="utf-8")
    script, directory = Path(start["directory"], start["command"][0]), start["directory"]
    if not (script.is_file() and os.path.isdir(directory)):
        script, directory = ROOT / "train.py", str(Path.cwd())
    ranks, threads = start["world_size"], str(start["threads"])
    what = f"training steps {segment.first + 1} to {last} on {ranks} ranks with {threads} threads again, by {segment.start}"
    say(what)
    code, output = run_train([*map(str, torchrun(ranks, file, script=script))], directory, {"OMP_NUM_THREADS": threads})
    if code:
        reason = f"{what}: exit code {code}, {last_words(output)}"
        of_run = (FILE, METRICS, "was made with", "is damaged", *start["files"]["the data"])
        if any(word in reason for word in of_run) and "cannot be written" not in reason:
            raise Differs(reason)
        raise UserError(f"the replay cannot run here: {reason}")


def _compare_segment(segment: Segment, run: Path, again: Path, say: Say) -> int:
    """Compare identity, plan, tensors and curves. Returns the exit code. Raises Differs."""
    entries, recorded = read_record(again), segment.start.content
    now = [entry for entry in entries if entry.kind == "start"][-1].content
    if found := differences(recorded["identity"], now["identity"]):
        raise Differs(f"{segment.start} cannot be replayed here: it was made with {'; '.join(found)}")
    then, here = (
        {key: start[key] for key in ("processor", "threads")}
        | {"devices": sorted({place["device"] for place in start["devices"]})}
        for start in (recorded, now)
    )
    why = [f"{key} {then[key]}, here {here[key]}" for key in then if then[key] != here[key]]
    on_cpu = all(device.startswith("cpu") for device in then["devices"])
    why += [] if on_cpu or recorded["config"]["run"]["deterministic"] else ["CUDA without run.deterministic"]
    problem = ""
    for entry in segment.checkpoints:
        saved = [one.content for one in entries if one.kind == "checkpoint" and one.step == entry.step]
        if not saved or saved[-1]["plan"] != entry.content["plan"]:
            raise Differs(
                f"the documents of the steps up to {entry.step} are not those of {entry}: the data have changed"
            )
        if saved[-1]["tensors"] != entry.content["tensors"]:
            problem = problem or f"the tensors after step {entry.step} are not those of {entry}"
    last, count = segment.checkpoints[-1].step, len({entry.step for entry in segment.checkpoints})
    before, after = (_rows_of(path, segment) for path in (run, again))
    record = read_record(run)
    later = next((one.number for one in record[segment.start.number :] if one.kind == "start"), math.inf)
    others = {key for key, one in _evaluations(record).items() if one.number > later}  # of the last step
    stops = [one.content["why"] for one in record if one.kind == "stop" and one.step == last]
    is_cut = stops[-1:] not in ([], ["finished"], ["run.stop_at"])  # a signal may have cut the last evaluation short
    others |= {key for key in after.keys() - before.keys() if is_cut and key[0] == last and key[1] in EVALUATIONS}
    rows = sorted((before.keys() & after.keys()) - others)
    lone = (before.keys() ^ after.keys()) - others
    unequal = [key for key in rows if before[key] != after[key]]  # the figures of the record are those of the rows
    if differing := sorted(lone) or unequal:
        step, kind = differing[0]
        curves = f"the {kind} curves of step {step} in {run / METRICS} are not those that the replay gives"
        problem = "; ".join(filter(None, (curves, problem)))
    steps = f"steps {segment.first + 1} to {last}: the tensors of {count} checkpoints and {len(rows)} rows of curves"
    if not problem:
        say(f"{steps} are equal to the bit")
        return EXACT
    if lone or not why:
        raise Differs(problem)
    losses = [(before[key][name], after[key].get(name)) for key in rows for name in before[key] if "/loss" in name]
    largest = max((abs(a - b) for a, b in losses if isinstance(b, float)), default=math.nan)
    say(f"{steps} are not equal to the bit, as may be ({'; '.join(why)}): losses differ by {largest:.3g} at most")
    return NOT_EXACT


def _rows_of(run: Path, segment: Segment) -> dict[tuple[int, str], dict]:
    """The rows of the steps of a segment. A row of means counts if all of its steps are in the segment."""
    every, found = segment.start.content["config"]["run"]["log_every"], {}
    for (step, kind), values in read_rows(run):
        since = max(segment.start.step, (step - 1) // every * every) if kind == "train" else segment.first
        is_inside = segment.first < step <= segment.checkpoints[-1].step or step == segment.first == 0
        if is_inside and since >= segment.first:
            found[step, kind] = values
    return found


# ---- What a run has seen -------------------------------------------------------------------------------------------------


def seen(entries: list[Entry], what: str) -> Iterator[str]:
    """Lines about the examples of the training data that `what` names: which they are, in which steps, on which ranks.

    what: a file of examples, ids or hashes; a hash; an id; or a text that they contain. No line has the text of an example.
    Raises Differs if the data are not those of the record.
    """
    from tools.check_step import read_run  # loads the models of transformers

    history = not_given_up(entries)
    starts = [entry for entry in history if entry.kind == "start"]
    path = Path(what).absolute() if os.path.isfile(what) else None
    steps, places, last, warnings = dict[str, list[str]](), dict[str, str](), 0, list[str]()
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        end = following.number if following else math.inf
        mine = [entry for entry in history if start.number <= entry.number < end]
        last = following.step if following else max(entry.step for entry in mine)
        directory = start.content["directory"]
        with contextlib.chdir(directory if os.path.isdir(directory) else "."):  # on another machine, as for a replay
            config, ranks = config_of(start.content["config"]), start.content["world_size"]
            inputs = read_run(config, ranks, torch.device("cpu"), ROOT / "train.py").inputs
            data = inputs.local.data
            wanted = wanted_by(path, data) if path else called(what)
            found = find(inputs.train, data, wanted)
        warnings = not_found(wanted, found, inputs.train)  # of the newest start
        here = dict[str, list[str]]()
        for one in found:  # copies have one digest
            here.setdefault(one.digest, []).append(one.where)
        places |= {digest: "; ".join(where) for digest, where in here.items()}
        digest_of_item = {item: one.digest for one in found for item in one.items}
        told = {step: list(of_step) for step, of_step in groupby(sorted(mine, key=STEP), STEP)}
        plan, sources = start.content["plan"], [source.fingerprint for source in inputs.train.sources]
        for step in range(start.step, last):
            items = tuple(inputs.plan.items(step))
            plan = plan_after(plan, step + 1, sources, items)
            if wrong := [one for one in told.get(step + 1, ()) if one.content.get("plan", plan) != plan]:
                raise Differs(
                    f"the documents of the steps up to {step + 1} are not those of {wrong[0]}: the data changed"
                )
            if digest_of_item.keys().isdisjoint(items):
                continue
            deal = inputs.deal(step)
            for group, dealt in (pair for micro_batch in deal.items for pair in enumerate(micro_batch)):
                for digest in {digest_of_item[item] for item in dealt if item in digest_of_item}:
                    steps.setdefault(digest, []).append(f"{step + 1} ({deal.ranks_of(group)})")
    for digest, where in places.items():
        yield f"{digest} | {where} | " + (f"steps {', '.join(steps[digest])}" if digest in steps else "in no step")
    yield f"{len(places)} examples of the training data, {len(steps)} of them in a step of the {last} that count"
    yield from (f"warning: {line}" for line in warnings)
