"""Train steps of a run again, and compare the tensors and curves with the record to the bit (docs/check.md)."""

import json
import math
import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.child_process import last_words
from common.errors import UserError
from common.sha256 import sha256
from data.remote import FETCHED
from distributed.checkpoint_directory import SET_ASIDE, checkpoint_name, complete_checkpoints, marks_of, step_of
from distributed.process_group import process_group
from model.dtypes import DTYPES, dtype_name
from scripts.chaos.compare import read_rows
from scripts.chaos.launch import ROOT, Launch, torchrun
from scripts.verify.files import (
    NOT_IN_EXPORT_JSON,
    Differs,
    Say,
    check_inputs,
    evaluations_of,
    in_directory_of,
    newest_exports,
    read_record,
    start_before,
)
from training.checkpointer import FILE, METRICS, PREPARED, Entry, not_given_up, prepared_in
from training.ending import ADAPTER_DIRECTORY, CERTIFICATE, EXPORT, read_certificate
from training.identity import differences
from training.log import EVALUATIONS

EXACT, NOT_EXACT = 0, 3  # exit codes of a replay
MOST = 0.1  # of a loss: the largest difference that rounding explains after any number of steps
OF_THE_RECORD = ("head", "files", "adapter", "identity", "asked")  # in export.json; compared with record and identity


class Segment(NamedTuple):
    """Steps that one start trained: from the checkpoint of step `first`, or from the base (0), to the last of `checkpoints`."""

    start: Entry
    first: int
    checkpoints: list[Entry]


def segments(entries: list[Entry], step: int | None) -> list[Segment]:
    """Return the steps to train again: from the checkpoint of `step` to the next one, or (None) all steps, start by start.

    Raise UserError if no checkpoint follows `step`.
    """
    every: list[Segment] = []
    for entry in not_given_up(entries):
        if entry.kind == "start":
            every.append(Segment(entry, entry.step, []))
        elif entry.kind == "checkpoint" and entry.step > every[-1].first:
            every[-1].checkpoints.append(entry)
    if step is None:
        return [segment for segment in every if segment.checkpoints]
    for segment in every:
        later = [entry for entry in segment.checkpoints if entry.step > step]
        if later and segment.first <= step:
            return [Segment(segment.start, step, [entry for entry in later if entry.step == later[0].step])]
    raise UserError(f"--replay {step}: the record has no checkpoint after this step of a start that had it")


def run_train(command: list[str], directory: str, environment: dict[str, str]) -> tuple[int, str]:
    """Run a training and return (exit code, output). A signal leaves no process behind. Tests replace this function."""
    with tempfile.TemporaryDirectory() as folder:
        with Launch(command, Path(folder, "output"), directory, **environment) as launch:
            return launch.process.wait(), launch.text()


def replay(
    run: Path, entries: list[Entry], step: int | None, say: Say, unproved: dict[Path, Entry] | None = None
) -> int:
    """Train from the checkpoint of `step` to the next one again, or all steps (None), export again, and compare the results.

    unproved: exports whose checkpoint is gone; those that the replay exports again are removed. Return the exit code: EXACT, or
    NOT_EXACT where this machine cannot be expected to give the same bits. Raise Differs.
    """
    chosen, code, own = segments(entries, step), EXACT, run / "export"
    exports = {folder: entry for folder, entry in newest_exports(run, entries).items() if folder.is_dir()}
    # Checkpoints that a budget has tried, and those that scripts/export.py has exported.
    tried = [candidate["step"] for candidate in read_certificate(run).get("candidates", ())]
    needed = tried + [entry.step for folder, entry in exports.items() if folder != own]
    with tempfile.TemporaryDirectory(prefix="replay-", dir=run.parent) as folder:
        replayed = Path(folder, run.name)
        if step:
            _copy_state(run, entries, step, replayed)
        for segment in chosen:
            check_inputs([segment.start])
            train_again(segment, replayed, say, keep=bool(needed))
            code = max(code, compare_segment(segment, run, replayed, say))
        last, entry = chosen[-1].checkpoints[-1], exports.get(own)
        is_end = entry and entry.number > max(each.number for each in entries if each.kind == "checkpoint")
        is_end = is_end and last.step == max(each.step for each in not_given_up(entries) if each.kind == "checkpoint")
        if code == EXACT and entry and is_end and (not step or not tried and entry.step == last.step):
            aside = [x for x in complete_checkpoints(replayed / "checkpoints") if tried and step_of(x) not in tried]
            for path in aside:  # the budget searches all checkpoints
                path.rename(path.with_suffix(SET_ASIDE))
            export = Segment(start_before(entries, entry), last.step, chosen[-1].checkpoints)
            train_again(export, replayed, say, keep=True, finish=True)
            for path in aside:
                path.with_suffix(SET_ASIDE).rename(path)
            for place in (own, run / ADAPTER_DIRECTORY):
                _compare_export(place, replayed / place.name, say)
            (unproved or {}).pop(own, None)
        for number, (place, entry) in enumerate(exports.items()) if code == EXACT else ():
            checkpoint, again = replayed / "checkpoints" / checkpoint_name(entry.step), Path(folder, f"again-{number}")
            if place != own and marks_of(checkpoint)["checkpoint"] == entry.content["checkpoint"]:
                _export_again(place, replayed, start_before(entries, entry).content, again)
                _compare_export(place, again, say)
                (unproved or {}).pop(place, None)
    return code


def _export_again(place: Path, replayed: Path, start: dict, out: Path) -> None:
    """Export the checkpoint of a replay to `out`, as scripts/export.py has exported it to `place`."""
    from training.checkpoint_export import read_export, write_export
    from training.model_card import base_model

    written = json.loads((place / EXPORT).read_text(encoding="utf-8"))
    dtype = next(name for name, dtype in DTYPES.items() if dtype_name(dtype) == written["dtype"])
    share = (written["averaged"] or {}).get("share_of_tuned")
    options = Namespace(step=written["step"], best=False, dtype=dtype, average_with_base=share)
    options.merge_lora = written["kind"] == "merged"
    with in_directory_of(start), process_group(device=torch.device("cpu")) as ranks:
        export = read_export(replayed, options, ranks)
        write_export(out, export, base_model(export.base)["hub_id"] or str(export.base))


def _compare_export(place: Path, again: Path, say: Say) -> None:
    """Compare every file of an export with the same export of a replay. Raise Differs."""
    from training.checkpoint_export import content

    def contents(folder: Path) -> dict[str, Any]:
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        by_name: dict[str, Any] = {
            name: sha256(path) if path.suffix == ".safetensors" else content(path)
            for name, path in files.items()
            if name not in NOT_IN_EXPORT_JSON
        }
        if CERTIFICATE in by_name:  # a start that was repeated has read its text once more
            by_name[CERTIFICATE] = json.loads(by_name[CERTIFICATE]) | {"readings": 0}
        if place.name == again.name and EXPORT in files:  # the run's own; one by hand may be named otherwise
            written = json.loads(files[EXPORT].read_text(encoding="utf-8"))
            by_name[EXPORT] = repr({key: value for key, value in written.items() if key not in OF_THE_RECORD})
        return by_name

    before, after = contents(place), contents(again)
    if differing := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise Differs(f"{place / differing[0]} is not what the replay exports")
    if before:
        say(f"{place}: its {len(before)} files are those that the replay exports")


def _copy_state(run: Path, entries: list[Entry], step: int, replayed: Path) -> None:
    """Copy everything that a start reads to continue from the checkpoint of `step`."""
    checkpoint = run / "checkpoints" / checkpoint_name(step)
    saved = [entry for entry in not_given_up(entries) if entry.kind == "checkpoint" and entry.step == step]
    if not saved or not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not there any more; replay from another step, or all steps: --replay all")
    shutil.copytree(checkpoint, replayed / "checkpoints" / checkpoint.name)
    lines = (run / FILE).read_bytes().splitlines(keepends=True)[: saved[-1].number]
    (replayed / FILE).write_bytes(b"".join(lines))
    (replayed / METRICS).write_bytes((run / METRICS).read_bytes()[: saved[-1].content["metrics"]["bytes"]])
    for folder in PREPARED:  # a folder that has changed since then is left out, and is made again
        is_unchanged = prepared_in(entries, folder) == prepared_in(entries[: saved[-1].number], folder)
        if is_unchanged and (run / folder).is_dir():
            shutil.copytree(run / folder, replayed / folder)


def train_again(segment: Segment, replayed: Path, say: Say, keep: bool = False, finish: bool = False) -> None:
    """Start train.py with the recorded config, ranks and threads, in another run directory and with an empty token cache.

    keep: keep all checkpoints. finish: the last step is taken already, and the run exports. Raise Differs if train.py refuses the
    record, the data or the identity, and UserError if it fails for another reason.
    """
    start, last = segment.start.content, segment.checkpoints[-1].step
    data, cache = start["config"]["data"], replayed.parent / "tokens"
    if data["cache"] and not cache.exists():
        cache.mkdir()
        if (fetched := Path(start["directory"], data["cache"], FETCHED)).is_dir():
            (cache / FETCHED).symlink_to(fetched)  # check_inputs has compared these files
    every = math.gcd(*(entry.step for entry in segment.checkpoints))
    changes = {"directory": str(replayed.parent), "name": replayed.name, "stop_at": None if finish else last}
    changes |= {"save_every": every, "keep_last": 10**6 if keep else 1}
    changes |= {"save_minutes": 0.0, "async_save": False, "log_to": [], "profile": None}
    changes |= {"resume": "changed" if start["config"]["run"]["resume"] == "changed" else "auto"}
    data = data | {"cache": data["cache"] and str(cache)}
    forgetting = start["config"].get("forgetting", {}) | {"strict": False}
    config = json.dumps(
        start["config"] | {"forgetting": forgetting, "run": start["config"]["run"] | changes, "data": data}
    )
    file = replayed.parent / "config.py"
    text = f"import json\n\nfrom configs.load import config_of\n\nconfig = config_of(json.loads({config!r}))\n"
    file.write_text(text, encoding="utf-8")
    script, directory = Path(start["directory"], start["command"][0]), start["directory"]
    if not (script.is_file() and os.path.isdir(directory)):
        script, directory = ROOT / "train.py", str(Path.cwd())
    ranks, threads = start["world_size"], str(start["threads"])
    what = f"exporting after step {last}" if finish else f"training steps {segment.first + 1} to {last}"
    doing = f"{what} on {ranks} ranks with {threads} threads again, by {segment.start}"
    say(doing)
    command = list(map(str, torchrun(ranks, file, script=script)))
    code, output = run_train(command, directory, {"OMP_NUM_THREADS": threads})
    if code:
        reason = f"{doing}: exit code {code}, {last_words(output)}"
        of_run = (FILE, METRICS, "was made with", "is damaged", *start["files"]["the data"])
        if any(word in reason for word in of_run) and "cannot be written" not in reason:
            raise Differs(reason)
        raise UserError(f"the replay cannot run here: {reason}")


def compare_segment(segment: Segment, run: Path, replayed: Path, say: Say) -> int:
    """Compare identity, plan, tensors and curves, and return the exit code. Raise Differs."""
    entries, recorded = read_record(replayed), segment.start.content
    newest = [entry for entry in entries if entry.kind == "start"][-1].content
    if changes := differences(recorded["identity"], newest["identity"]):
        raise Differs(f"{segment.start} cannot be replayed here: it was made with {'; '.join(changes)}")
    problem = ""
    for entry in segment.checkpoints:
        saved = [each.content for each in entries if each.kind == "checkpoint" and each.step == entry.step]
        if not saved or saved[-1]["plan"] != entry.content["plan"]:
            raise Differs(
                f"the documents of the steps up to {entry.step} are not those of {entry}: the data have changed"
            )
        if saved[-1]["tensors"] != entry.content["tensors"]:
            problem = problem or f"the tensors after step {entry.step} are not those of {entry}"
    last, count = segment.checkpoints[-1].step, len({entry.step for entry in segment.checkpoints})
    before, after = (rows_of(directory, segment) for directory in (run, replayed))
    ignored = _rows_not_compared(segment, run, {*before}, {*after})
    keys = sorted((before.keys() & after.keys()) - ignored)
    lone = sorted((before.keys() ^ after.keys()) - ignored)
    if differing := lone or [key for key in keys if before[key] != after[key]]:
        step, kind = differing[0]
        curves = f"the {kind} curves of step {step} in {run / METRICS} are not those that the replay gives"
        problem = "; ".join(filter(None, (curves, problem)))
    steps = f"steps {segment.first + 1} to {last}: the tensors of {count} checkpoints and {len(keys)} rows of curves"
    if not problem:
        say(f"{steps} are equal to the bit")
        return EXACT
    reasons = _reasons_for_other_bits(recorded, newest)
    if lone or not reasons:
        raise Differs(problem)
    losses = [
        (key[0], before[key].get(name), after[key].get(name))
        for key in keys
        for name in before[key].keys() | after[key].keys()
        if "/loss" in name
    ]
    # Lists, because json.loads has a single NaN, which does not equal itself.
    apart, largest = [_apart(*loss, segment) for loss in losses if [loss[1]] != [loss[2]]], 0.0
    if apart:
        share, largest, step = max(apart)
        if share > 1:
            what = f"losses of step {step} differ by {largest:.3g}, {share:.2g} times as far as rounding explains"
            raise Differs(f"{what} ({'; '.join(reasons)}); {problem}")
    say(
        f"{steps} are not equal to the bit, as may be ({'; '.join(reasons)}): losses differ by {largest:.3g} at most, within "
        "the bound of rounding; the tensors and other curves are not compared"
    )
    return NOT_EXACT


def _apart(step: int, loss: Any, again: Any, segment: Segment) -> tuple[float, float, int]:
    """Return a difference of two losses as a share of what rounding explains, the difference in nats, and the step.

    Rounding errors of steps add up as a random walk does, from what the check allows in step 3. No losses may differ by more
    than MOST.
    """
    from scripts.check.runs import ALLOWED_LATER, STEPS  # loads the models of transformers

    if not (isinstance(loss, float) and isinstance(again, float) and math.isfinite(loss - again)):
        return math.inf, math.inf, step
    allowed, _ = ALLOWED_LATER[DTYPES[segment.start.content["config"]["model"]["compute_dtype"]]]
    bound = min(MOST, allowed * math.sqrt(max(1.0, (step - segment.first) / STEPS)))
    return abs(loss - again) / (bound * max(abs(loss), 0.1)), abs(loss - again), step


def _rows_not_compared(segment: Segment, run: Path, before: set, after: set) -> set[tuple[int, str]]:
    """Return the keys of evaluations that the replay cannot give: of a later start, or cut short by a signal."""
    record, last = read_record(run), segment.checkpoints[-1].step
    later = next((entry.number for entry in record[segment.start.number :] if entry.kind == "start"), math.inf)
    ignored = {key for key, entry in evaluations_of(record).items() if entry.number > later}
    stops = [entry.content["why"] for entry in record if entry.kind == "stop" and entry.step == last]
    if stops[-1:] not in ([], ["finished"], ["run.stop_at"]):
        ignored |= {key for key in after - before if key[0] == last and key[1] in EVALUATIONS}
    return ignored


def _reasons_for_other_bits(recorded: dict, newest: dict) -> list[str]:
    """Return the differences between two starts, of the run and of its replay, that may change the bits of a sum."""
    then, here = (
        {key: start[key] for key in ("processor", "threads")}
        | {"devices": sorted({place["device"] for place in start["devices"]})}
        for start in (recorded, newest)
    )
    reasons = [f"{key} {then[key]}, here {here[key]}" for key in then if then[key] != here[key]]
    on_cpu = all(device.startswith("cpu") for device in then["devices"])
    if not on_cpu and not recorded["config"]["run"]["deterministic"]:
        reasons.append("CUDA without run.deterministic")
    return reasons


def rows_of(run: Path, segment: Segment) -> dict[tuple[int, str], dict]:
    """Return the rows of the segment's steps by (step, kind). A row of means counts if the segment has all of its steps."""
    every, rows = segment.start.content["config"]["run"]["log_every"], {}
    for (step, kind), values in read_rows(run):
        since = max(segment.start.step, (step - 1) // every * every) if kind == "train" else segment.first
        is_inside = segment.first < step <= segment.checkpoints[-1].step or step == segment.first == 0
        if is_inside and since >= segment.first:
            rows[step, kind] = values
    return rows
