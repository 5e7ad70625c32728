"""Compare all files of a run with its record: metrics.jsonl, checkpoints, exports, the base model and the data (docs/check.md)."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

from common.durable_files import SUFFIX, temporary_path
from common.errors import UnknownFormat, UserError
from common.sha256 import sha256, sha256_of_all
from configs.config import Config
from configs.load import config_of
from distributed.checkpoint_directory import (
    INDEX,
    MANIFEST,
    SET_ASIDE,
    CheckedFile,
    CheckpointReader,
    checkpoint_name,
    marks_of,
    read_manifest,
)
from distributed.process_group import library_versions
from model.architectures import first_new_row, read_model_config
from model.language_model import build_on_meta, untrained_tensors
from model.lora import BASE, adapter_of_checkpoint, write_adapter
from model.weight_files import StoredTensor, stored_tensors
from model.weights import Weights, weights_of_directory
from scripts.chaos.compare import read_rows
from scripts.verify.grammar import first_problem
from training.checkpointer import FILE, METRICS, PREPARED, Entry, Record, not_given_up
from training.description import counted
from training.ending import ADAPTER_DIRECTORY, BOM, CARD, CERTIFICATE, EXPORT, SIGNATURE
from training.identity import changes_here

NOT_COMPARED = "not compared"  # in each line about files or entries that were not
UNFINISHED = (
    "its temporary name: the run is writing it, or has died there, and mends it when it is started again; "
    f"{NOT_COMPARED}"
)
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
NOT_IN_EXPORT_JSON = (EXPORT, CARD, BOM, SIGNATURE)  # files of an export that export.json does not list
Say = Callable[[str], None]
Bounds = Callable[[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Differs(Exception):
    """A file or an entry differs from the record. The message is one sentence that names the file, the entry and the step."""


def read_record(run: Path) -> list[Entry]:
    """Return the entries of the record. Raise Differs if its chain is broken.

    Raise UserError if the run has no record, or if another version of the code wrote it in another format.
    """
    try:
        entries = Record(run).read()
    except UnknownFormat:
        raise
    except UserError as error:
        raise Differs(str(error)) from error
    if not entries:
        raise UserError(f"{run} has no {FILE} with a start; name the directory of a run, such as runs/quickstart")
    if entries[0].kind != "start":
        raise Differs(f"{run / FILE}: {entries[0]} comes before the first start")
    return entries


def compare(
    run: Path, head: str | None, say: Say, allow_later: bool = False, left: list[str] | None = None
) -> list[Entry]:
    """Compare all files with the record, say a line about each part, and return the entries.

    left: gets the lines about parts that were not compared. allow_later: entries may follow the head. Raise Differs at the first
    difference. A run may train meanwhile: if the record has grown since it was read, the comparison starts again, because the
    difference may be a file that the run has replaced.
    """
    while True:
        entries = read_record(run)
        try:
            lines = list[str]()
            for line in check_files(run, entries, head, allow_later):
                say(line)
                lines.append(line)
            left = [] if left is None else left
            left += [line for line in lines if NOT_COMPARED in line]
            say("nothing differs from the record")
            return entries
        except PermissionError:  # a file that cannot be read may still be as recorded
            raise
        except (
            Differs,
            OSError,
            KeyError,
            IndexError,
            TypeError,
            AttributeError,
            ValueError,
            RecursionError,
        ) as problem:
            if len(read_record(run)) == len(entries):
                is_known = isinstance(problem, Differs | OSError)
                text = str(problem) if is_known else f"{run / FILE} or {EXPORT} is not what a run writes: {problem!r}"
                raise Differs(text) from problem
            say("the run has gone on meanwhile: once more from the beginning")


def check_files(run: Path, entries: list[Entry], head: str | None, allow_later: bool = False) -> Iterator[str]:
    """Compare all files with the record, and yield a line about each part. Raise Differs at the first difference."""
    yield from _check_head(run, entries, head, allow_later)
    if problem := first_problem(entries):
        raise Differs(f"{run / FILE}: {problem}")
    starts = [entry for entry in entries if entry.kind == "start"]
    for entry in starts:
        for name, digest in entry.content["written"].items():
            # Each start replaces config.json.
            if name != "config.json" or (entry is starts[-1] and not _is_before(run / name, starts, entries)):
                _compare(run / name, digest, entry)
    last = starts[-1].content
    by = f"the last by {last['started_by']}, approved by {last['approved_by'] or 'nobody'}"
    yield f"starts: {len(starts)}, {by}, on {counted(last['world_size'], 'rank')} of {last['processor']}"
    yield _check_metrics(run, entries, starts[-1])
    yield _check_checkpoints(run, entries)
    yield from _check_prepared(run, entries)
    # Of several starts from the same step only the last one trained steps that count.
    yield check_inputs(list({entry.step: entry for entry in not_given_up(entries) if entry.kind == "start"}.values()))
    yield from _check_exports(run, entries)
    others = [path for path in (run / "checkpoints").glob("*") if not path.name.startswith("step-")]
    others += [
        path for path in [run / "config.json"] if path.exists() and path.name not in starts[-1].content["written"]
    ]
    others += [path for path in sorted((run / "eval").rglob("*")) if not path.is_dir()]
    yield from (f"{path}: no entry names it, so {NOT_COMPARED}" for path in others)


def _is_before(config: Path, starts: list[Entry], entries: list[Entry]) -> bool:
    """Return whether config.json still belongs to the start before: a kill came between the last start's entry and its file."""
    if entries[-1] is not starts[-1]:
        return False
    return _is(config, starts[-2].content["written"]["config.json"]) if starts[1:] else not config.exists()


def _check_head(run: Path, entries: list[Entry], head: str | None, allow_later: bool) -> Iterator[str]:
    """Yield a line about the record, and about each entry after the head. Raise Differs if these are not allowed."""
    line = f"record: {len(entries)} entries hold each other, head {entries[-1].digest}"
    line += f", after which a line was cut off by a kill, {NOT_COMPARED}" if Record(run).torn() else ""
    if head is None:
        yield f"{line}; only --head with a copy that was kept elsewhere shows that it was not written anew"
        return
    if not re.fullmatch("[0-9a-f]{16,64}", head := head.lower()):
        raise UserError(f"--head {head}: give 16 to 64 hexadecimal digits")
    covered = next((entry for entry in entries if entry.digest.startswith(head)), None)
    if covered is None:
        raise Differs(
            f"{run / FILE}: no entry has the head {head}: an entry was changed, or entries at the end were dropped"
        )
    later = entries[covered.number :]
    if later and not allow_later:
        raise Differs(
            f"{run / FILE}: {later[0]} and {len(later) - 1} more follow {covered}, whose head is {head}; --allow-later lists them"
        )
    yield f"{line}; {head} is the head after {covered}"
    yield from (f"{entry} follows the head, so it and its files are {NOT_COMPARED} with it" for entry in later)


def _check_metrics(run: Path, entries: list[Entry], last_start: Entry) -> str:
    """Compare metrics.jsonl with the record. A start drops rows and records the rest, so only entries since the last count."""
    path, end, digest = run / METRICS, 0, hashlib.sha256()
    content = path.read_bytes() if path.is_file() else b""
    since = [entry for entry in entries[last_start.number - 1 :] if entry.content.get("metrics")]
    # Sorted by size, because the entry of a save in the background comes after the entries of later rows.
    for entry in sorted(since, key=lambda entry: entry.content["metrics"]["bytes"]):
        prefix = entry.content["metrics"]
        digest.update(memoryview(content)[end : prefix["bytes"]])
        end = prefix["bytes"]
        if digest.hexdigest() != prefix["sha256"]:
            raise Differs(f"{path} is not what {entry} says: a row up to there was changed, added or removed")
    # splitlines, like the readers of these rows.
    num_rows, num_later = (len(part.splitlines()) for part in (content[:end], content[end:]))
    # scripts/export.py may add its entry while the run trains.
    if num_later and any(entry.kind == "stop" for entry in entries[last_start.number :]):
        raise Differs(f"{path}: {num_later} rows at its end are in no entry, and the run had ended at {entries[-1]}")
    rows = dict(keyed_rows := read_rows(run))
    if len(rows) < len(keyed_rows):
        step, kind = Counter(key for key, _ in keyed_rows).most_common(1)[0][0]
        raise Differs(f"{path} has two rows of step {step} ({kind})")
    for (step, kind), entry in evaluations_of(entries).items():
        row = rows.get((step, kind))
        # A kill came before the evaluation's checkpoint was saved, and the next start dropped the row.
        later = entries[entry.number :]
        is_dropped = row is None and any(start.kind == "start" and start.step == step for start in later)
        if not is_dropped and (row is None or row | entry.content["figures"] != row):
            raise Differs(f"{path} has not the figures of {entry} in its row of step {step} ({kind})")
    return f"{METRICS}: {num_rows} rows" + (f", {num_later} after the last entry, {NOT_COMPARED}" if num_later else "")


def evaluations_of(entries: list[Entry]) -> dict[tuple[int, str], Entry]:
    """Return (step, first word of its curves) -> the newest entry of each evaluation at a step that the run has not given up."""
    evaluations = [entry for entry in not_given_up(entries) if entry.kind == "evaluation" and entry.content["figures"]]
    return {(entry.step, next(iter(entry.content["figures"])).partition("/")[0]): entry for entry in evaluations}


def _check_checkpoints(run: Path, entries: list[Entry]) -> str:
    """Compare all bytes of every checkpoint on the disk, and check that no checkpoint is missing."""
    folder = run / "checkpoints"
    saved, removed = dict[str, list[Entry]](), set[str]()  # name -> its entries; names that later entries remove
    for entry in not_given_up(entries):
        removed |= {*entry.content.get("removed", ()), *entry.content.get("set_aside", ())}
        if entry.kind == "checkpoint":
            saved.setdefault(checkpoint_name(entry.step), []).append(entry)
            removed.discard(checkpoint_name(entry.step))
    present = {path.name for path in folder.glob("step-*") if path.is_dir() and not path.name.endswith(SUFFIX)}
    known = {checkpoint_name(entry.step) for entry in entries if entry.kind == "checkpoint"}
    known |= {name + SET_ASIDE for entry in entries for name in entry.content.get("set_aside", [])}
    if unknown := sorted(present - known):
        raise Differs(f"{folder / unknown[0]} is named by no entry of {FILE}")
    if revived := sorted(name for name in present - saved.keys() if not name.endswith(SET_ASIDE)):
        raise Differs(f"{folder / revived[0]} is here, but a later start of {FILE} continued from an earlier step")
    for name in [name for name in saved if name in present]:
        _check_checkpoint(folder / name, saved[name], entries)
    unfinished = [name for name in saved if name not in present | removed]
    for name in unfinished:
        entry = saved[name][-1]
        if not _is(temporary_path(folder / name) / MANIFEST, entry.content["manifest"]):
            raise Differs(f"{folder / name} is missing: {entry} names it, and no entry says that it was removed")
    whole, given_up = present & saved.keys(), sorted(present - saved.keys())
    line = f"checkpoints: {len(whole)} whole, {len(saved) - len(whole) - len(unfinished)} removed"
    line += f"; {', '.join(unfinished)} has {UNFINISHED}" if unfinished else ""
    return line + (f"; {NOT_COMPARED}, because the run has given them up: {', '.join(given_up)}" if given_up else "")


def _check_checkpoint(path: Path, saved: list[Entry], entries: list[Entry]) -> None:
    """Compare all bytes of a checkpoint with its newest entry, or with an earlier one if a kill came before a replacement."""
    for entry in saved[::-1]:
        if _is(path / MANIFEST, entry.content["manifest"]):
            break
        following = next((later for later in entries[entry.number :] if later.kind != "export"), None)
        if entry is saved[0] or (following and following.kind != "start"):  # no kill came before the replacement
            raise Differs(f"{path / MANIFEST} is not the one of {saved[-1]}: it was changed, or is of another run")
    try:
        files = read_manifest(path)["files"]

        def check(file: str) -> None:
            with CheckedFile(path / file, files[file], f"{entry} names it") as checked:
                checked.check()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # one core is slower than most disks
            list(pool.map(check, files))
        if INDEX in files:
            CheckpointReader(path, files, f"{entry} names it")  # an index that names code is refused
    except UnknownFormat:  # the manifest is the recorded one, and another version of the code wrote it
        raise
    except UserError as error:
        raise Differs(f"{error} ({entry})") from error
    # A kill may have left the temporary manifest.
    _refuse_unknown_files(path, {MANIFEST, MANIFEST + SUFFIX, *files}, entry)


def _check_prepared(run: Path, entries: list[Entry]) -> Iterator[str]:
    """Compare the files that the base model made before the first step (PREPARED). A directory may be missing: it is made again."""
    for folder in [folder for folder in PREPARED if (run / folder).is_dir()]:
        recorded = [entry for entry in entries if entry.kind == "prepared" and entry.content["folder"] == folder]
        if recorded:
            _compare_all(run / folder, recorded[-1].content["files"], recorded[-1])
        count = f"{len(recorded[-1].content['files'])} files" if recorded else f"in no entry, so {NOT_COMPARED}"
        yield f"{folder}: {count}"


def newest_exports(run: Path, entries: list[Entry]) -> dict[Path, Entry]:
    """Return directory -> the newest entry of an export to it, also for one that is not here."""
    recorded, own = [entry for entry in entries if entry.kind == "export"], run / "export"
    # Resolved, because one directory may have two names.
    exports = {(run / entry.content["directory"]).resolve(): entry for entry in recorded}
    return {own if place == own.resolve() else place: entry for place, entry in exports.items()}


def start_before(entries: list[Entry], entry: Entry) -> Entry:
    """Return the newest start before an entry."""
    return [earlier for earlier in entries[: entry.number] if earlier.kind == "start"][-1]


def unproved_exports(run: Path, entries: list[Entry]) -> dict[Path, Entry]:
    """Return the exports that are here, and whose checkpoint is gone: only a replay can tell which weights they have."""
    return {
        folder: entry
        for folder, entry in newest_exports(run, entries).items()
        if folder.exists()
        and marks_of(run / "checkpoints" / checkpoint_name(entry.step))["checkpoint"] != entry.content["checkpoint"]
    }


def _check_exports(run: Path, entries: list[Entry]) -> Iterator[str]:
    """Compare the newest export in each directory with its entry, its checkpoint, its base and the head that it names."""
    exports, own = newest_exports(run, entries), run / "export"
    if own.exists() and own not in exports:
        raise Differs(f"{own} is named by no entry of {FILE}")
    for folder, entry in exports.items():
        digest = entry.content["sha256"]
        if not folder.exists() and folder != own:
            yield f"export {folder}: not here, so {NOT_COMPARED}"
            continue
        if not _is(folder / EXPORT, digest) and _is(temporary_path(folder) / EXPORT, digest):
            yield f"export {folder}: the one of {entry} has {UNFINISHED}"
            continue
        _compare(folder / EXPORT, digest, entry)
        written = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        adapter = written.get("adapter", {})
        _compare_all(folder, written["files"], entry, NOT_IN_EXPORT_JSON)
        if adapter or (folder == own and (run / ADAPTER_DIRECTORY).exists()):
            _compare_all(run / ADAPTER_DIRECTORY, adapter, entry, NOT_IN_EXPORT_JSON)
        if written["head"] not in [earlier.digest for earlier in entries[: entry.number - 1]]:
            raise Differs(f"{folder / EXPORT} names the head {written['head']}, which no entry before {entry} has")
        earlier = entries[: entry.number]
        saved = [each.content for each in earlier if each.kind == "checkpoint" and each.step == entry.step]
        tensors = [content["tensors"] for content in saved]
        if written["checkpoint"] != entry.content["checkpoint"] or written["checkpoint"] not in tensors:
            raise Differs(f"{folder / EXPORT} is of no checkpoint of step {entry.step} that {FILE} has")
        start = start_before(entries, entry)
        if folder == own:
            _check_choice(folder, written, start, not_given_up(earlier))
        settings = _compare_beside_weights(folder, written, start)
        verdict = compare_tensors(run, folder, written, start.content, entry)
        count = len(written["files"]) + len(adapter)
        line = f"export {folder}: {count} files, the {written['weights']} weights of step {entry.step}, {verdict}; {settings}"
        notes = [name for name in (CARD, BOM, SIGNATURE) if (folder / name).exists()]
        yield line + (f"; {', '.join(notes)}: {NOT_COMPARED}" if notes else "")


def _check_choice(folder: Path, written: dict, start: Entry, earlier: list[Entry]) -> None:
    """Raise Differs unless the run's own export is of the weights that its settings name: by a budget, the best, or the last."""
    config, weights, step = start.content["config"], written["weights"], written["step"]
    budget = {name: config["forgetting"].get(name) for name in ("max_kl", "max_drop", "min_gain")}
    if (budget["max_kl"], budget["max_drop"]) != (None, None):
        certificate = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
        texts = {text["file"]: text["sha256"] for text in certificate["texts"]}
        expected = budget | {name: written[name] for name in ("step", "checkpoint", "averaged")}
        is_chosen = texts in [entry.content["files"] for entry in earlier if entry.kind == "certificate"]
        is_chosen &= all(certificate.get(name) == value for name, value in expected.items())
    else:
        last = max(entry.step for entry in earlier if entry.kind == "checkpoint")
        is_chosen = CERTIFICATE not in written["files"] and not written.get("averaged")
        is_chosen &= config["run"]["export"] == "best" if weights == "best" else step == last
    if not is_chosen:
        raise Differs(f"{folder}: the {weights} weights of step {step} are not those that {start} exports")


def _base(start: dict) -> Path:
    return Path(start["directory"], start["config"]["model"]["path"])


@contextlib.contextmanager
def in_directory_of(start: dict) -> Iterator[Config]:
    """Yield the settings of a start in its working directory, to which their paths are relative."""
    with contextlib.chdir(start["directory"] if os.path.isdir(start["directory"]) else "."):
        yield config_of(start["config"])


def _compare_beside_weights(folder: Path, written: dict, start: Entry) -> str:
    """Compare template, tokenizer and settings of an export with those that base and run give. Return a line about them."""
    if not _base(start.content).is_dir():
        return f"template, tokenizer and settings are {NOT_COMPARED}, because the base is not here"
    from training.checkpoint_export import differing_files  # loads the models of transformers

    with in_directory_of(start.content) as config:
        changes, differing = changes_here(start.content), differing_files(folder, config, written)
    if changes:
        raise Differs(f"{start} has another base or settings than its identity: {'; '.join(changes)}")
    if differing:
        then, here = start.content["versions"]["transformers"], library_versions()["transformers"]
        raise Differs(
            f"{folder / differing[0]} is not what the base and the settings of {start} give (transformers {then}, here {here})"
        )
    if CERTIFICATE in written["files"]:
        return "template, tokenizer and settings are those of base and run, certificate.json is not compared"
    return "template, tokenizer and settings are those of base and run"


def compare_tensors(run: Path, folder: Path, written: dict, start: dict, entry: Entry) -> str:
    """Compare an export's tensors with its checkpoint, or with the average of checkpoint and base. Return a line about it.

    Tensors that were not trained must be the base's. written: the export's export.json. start: the entry of the start that
    trained the checkpoint. Raise Differs.
    """
    from scripts.check.tensors import compare_export, registered, trained  # loads the models of transformers

    checkpoint, averaged = run / "checkpoints" / checkpoint_name(entry.step), written.get("averaged") or {}
    base, of_base = _base(start), dict[str, bool]()
    is_merged, is_adapter = written.get("adapter") or written.get("kind") == "merged", written.get("kind") == "adapter"
    if (is_merged or is_adapter) and not start["config"]["lora"]["rank"]:
        raise Differs(f"{folder / EXPORT} names an adapter, and the run has trained none")
    if not 0 <= averaged.get("share_of_tuned", 1.0) <= 1:
        raise Differs(f"{folder / EXPORT} names a share of {averaged['share_of_tuned']}, and no average has it")
    if marks_of(checkpoint)["checkpoint"] != entry.content["checkpoint"]:
        return "NOT PROVED, because their checkpoint is gone"
    if averaged and not base.is_dir():
        return f"{NOT_COMPARED} with the tensors of their checkpoint"
    if not averaged and base.is_dir() and (is_adapter or written.get("adapter")):
        _compare_adapter(folder if is_adapter else run / ADAPTER_DIRECTORY, checkpoint, written, start, entry)
        return "with the adapter of their checkpoint" + (
            f", but merged weights are {NOT_COMPARED}" if is_merged else ""
        )
    if is_merged or is_adapter:
        return f"{NOT_COMPARED} with the tensors of their checkpoint"
    files, share, bounds = stored_tensors(folder), averaged.get("share_of_tuned", 1.0), None
    weights, copies = None, dict[str, StoredTensor]()
    if base.is_dir():
        model = build_on_meta(read_model_config(str(folder)))
        weights = weights_of_directory(base, model)
        copies = untrained_tensors(model, base, start["config"]["run"].get("export_mtp", True))
    if averaged and weights:
        bounds = _bounds(weights, first_new_row(base), share, "asked" in written)
    names = trained(checkpoint)
    is_equal, source = compare_export(folder, checkpoint, names, bounds), "the tensors"
    for prefix in registered(checkpoint) if not averaged and not all(is_equal.values()) else ():
        of_registered = compare_export(folder, checkpoint, names, prefix=prefix)
        if all(of_registered.values()):  # an edited loop exports, for example, an average of the weights
            is_equal, source = of_registered, prefix.rstrip(".")
    if weights:
        read, frozen = weights.read, sorted(weights.shapes.keys() - {*names})
        of_base = compare_export(folder, checkpoint, frozen, _kept, read=lambda name: read(name).float())
        of_base |= dict.fromkeys({*names} - weights.shapes.keys(), False)  # such as a head that config.json ties
    wrong = sorted(name for name, same in (is_equal | of_base).items() if not same)
    wrong += [
        name
        for name, copied in copies.items()
        if name not in files or not torch.equal(files[name].copy(), copied.copy())
    ]
    wrong += sorted(files.keys() - is_equal.keys() - of_base.keys() - copies.keys()) if weights else []
    for file in {tensor.file for tensor in files.values()}:
        with safe_open(file, framework="pt") as opened:
            wrong += [name for name in opened.keys() if files[name].file != file]  # noqa: SIM118 (no dictionary)
    dtype = SAFETENSORS[written["dtype"]]
    wrong += [name for name, stored in files.items() if stored.dtype != dtype and name not in copies]
    if wrong:
        raise Differs(f"{folder}: {wrong[0]} is not what {checkpoint} has, of which {entry} says that it is")
    verdict = f"averages of the base and {share:g} x the tensors" if averaged else f"equal to {source}"
    rest = f", and {len(of_base) + len(copies)} to those of the base" if of_base or copies else ""
    return f"{verdict} of their checkpoint{rest}" + ("" if weights else f"; untrained ones are {NOT_COMPARED}")


def _kept(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds of an untrained tensor of the base, which a run may have kept in bf16 and averaged with itself."""
    rounded, apart = tensor.bfloat16().float(), 2**-21 * tensor.abs()
    return tensor.minimum(rounded) - apart, tensor.maximum(rounded) + apart


def _compare_adapter(folder: Path, checkpoint: Path, written: dict, start: dict, entry: Entry) -> None:
    """Compare every file of an exported adapter, except its tokenizer, with the one that checkpoint and base give."""
    from training.checkpoint_export import content
    from training.model_card import base_model

    with tempfile.TemporaryDirectory() as temporary, in_directory_of(start) as config:
        adapter, base, name = adapter_of_checkpoint(checkpoint, config.lora), Path(config.model.path), config.model.path
        dtype = None
        if written.get("kind") == "adapter":  # by scripts/export.py
            name, dtype = base_model(base)["hub_id"] or str(base), getattr(torch, written["dtype"])
        write_adapter(Path(temporary), adapter, base, name, lambda _, tensor: tensor.to(dtype or tensor.dtype))
        given = {path.name: path for path in Path(temporary).iterdir()}
        if config.model.rope_type:
            del given[BASE]  # model/lora.py leaves it out
        wrong = [
            file for file in given if not (folder / file).is_file() or content(folder / file) != content(given[file])
        ]
        wrong += sorted(written.get("adapter", {}).keys() - given.keys())
    if wrong:
        raise Differs(f"{folder / wrong[0]} is not what {checkpoint} gives, of which {entry} says that it is")


def _bounds(weights: Weights, new_row: int | None, share: float, is_of_the_run: bool) -> Bounds:
    """Return a function (name, trained tensor) -> the smallest and largest tensors that base + share (tuned - base) may be.

    The bounds allow for any order of rounding in fp32. is_of_the_run: base and average were first rounded to the dtype of the
    parameters (training/budget.py).
    """

    def bounds(name: str, tuned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        old = weights.read(name)
        old = old.to(tuned.dtype if is_of_the_run else old.dtype).float()
        new = tuned[: len(old)].float()
        mixed, apart = old.lerp(new, share), 2**-21 * torch.maximum(old.abs(), new.abs())
        if new_row is not None and name in weights.vocabulary:
            mixed[new_row:] = new[new_row:]  # rows of new tokens are not averaged
        ends = mixed - apart, mixed + apart
        return (ends[0].to(tuned.dtype), ends[1].to(tuned.dtype)) if is_of_the_run else ends

    return bounds


def check_inputs(starts: list[Entry]) -> str:
    """Compare the files that the starts read: the base with its tokenizer, and all data. Return a line about them.

    Missing files are not compared. Of a file that was replaced between two starts (run.resume=changed) the last reading counts.
    """
    parts = [(start, part, digests) for start in starts for part, digests in start.content["files"].items()]
    recorded = {Path(name): (start, part, digests[name]) for start, part, digests in parts for name in digests}
    present = [path for path in recorded if path.is_file()]
    for path, digest in sha256_of_all(present).items():
        start, part, expected = recorded[path]
        if digest != expected:
            raise Differs(f"{path} ({part}) is not what {start} has read: its SHA-256 is another one")
    num_missing = len({file for *_, digests in parts for file in digests.items()}) - len(present)
    return f"base and data: {len(present)} files" + (
        f"; {num_missing} are not here, so {NOT_COMPARED}" if num_missing else ""
    )


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def _refuse_unknown_files(folder: Path, names: set[str], entry: Entry) -> None:
    """Raise Differs if a folder has a file beside `names`, because it may change how a model is loaded. git's files may stay."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    if unknown := sorted(name for name in files - names if not name.startswith(".git")):
        raise Differs(f"{folder / unknown[0]} is named by nothing that {entry} names")


def _compare_all(folder: Path, digests: dict[str, str], entry: Entry, may_have: Iterable[str] = ()) -> None:
    """Compare all files of a folder with their SHA-256. may_have: names of files that are allowed and not compared."""
    for name, digest in digests.items():
        _compare(folder / name, digest, entry)
    _refuse_unknown_files(folder, {*digests, *may_have}, entry)


def _compare(path: Path, digest: str, entry: Entry) -> None:
    if not path.is_file():
        raise Differs(f"{path} is missing: {entry} names it")
    if sha256(path) != digest:
        raise Differs(f"{path} is not what {entry} says: its SHA-256 is another one")
