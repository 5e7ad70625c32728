"""The directory of a run's checkpoints: which are complete and whole, which one is the newest, and which may go.

    checkpoints/step-000120/   .metadata, __<rank>_0.distcp (torch.distributed.checkpoint), manifest.json
    checkpoints/latest         name of the checkpoint from which the run continues

manifest.json is written last. It holds the saved state (JSON of the loop), the values that are no tensors (of the optimizer,
and of what is registered) and, of every other file, the size and the checksums; a checksum covers the manifest itself. The
state names the best checkpoint, so that one file, replaced atomically, says everything.
A directory named `step-<digits>` is complete, because its name comes from a rename; an interrupted one ends in `.tmp`.
A checkpoint is whole if all of its files have the size and the checksums of the manifest.
"""

import functools
import json
import re
import shutil
import zlib
from pathlib import Path

from common.durable_files import SUFFIX, temporary_path, write_durably, write_json
from common.errors import UserError
from distributed.checkpoint_files import CheckedFile, check_size
from distributed.process_group import Ranks, gather_objects, read_on_first

MANIFEST = "manifest.json"
SET_ASIDE = ".bad"  # suffix of checkpoints whose weights gave a loss that is not finite
LAST_COMMIT = "4dc3bfb"  # that reads manifests without "values"
PREVIOUS = "run.resume=previous continues from the newest whole checkpoint"


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:06d}"


def write_manifest(folder: Path, state: dict, files: dict[str, dict], values: dict) -> None:
    """Write manifest.json, the last file of a checkpoint. `files`: the entries of distributed/checkpoint_files.py."""
    content = json.loads(json.dumps({"state": state, "values": values, "files": files}))  # as it will be read
    write_json(folder / MANIFEST, content | {"checksum": _checksum(content)})


def read_manifest(checkpoint: Path, hint: str = PREVIOUS) -> dict:
    """{"state", "values", "files"}. Raises UserError, with the `hint`, if the manifest is missing or damaged."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{path} is missing: the checkpoint is damaged, or another version of this code wrote it; {hint}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sound = content.pop("checksum") == _checksum(content)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        sound = False
    if sound and "values" not in content:
        raise UserError(
            f"{checkpoint} is of an earlier version of this code: finish its run with commit {LAST_COMMIT} or an earlier one, "
            "or start a new run with another run.name"
        )
    if sound:
        return content
    raise UserError(f"{path} is damaged: its content does not match its checksum; {hint}")


def replace_state(checkpoint: Path, state: dict) -> None:
    """Replace the saved state of a checkpoint atomically. Call it on rank 0 alone."""
    content = read_manifest(checkpoint)
    write_manifest(checkpoint, state, content["files"], content["values"])


def check_files(checkpoint: Path, hint: str = PREVIOUS) -> None:
    """Raise UserError, with the `hint`, if the manifest is damaged, or a file is missing or has another size. Rank 0 alone."""
    for name, entry in sorted(read_manifest(checkpoint, hint)["files"].items()):
        check_size(checkpoint / name, entry, hint)


def check_whole(checkpoint: Path, ranks: Ranks, hint: str = PREVIOUS) -> None:
    """Read every file of a checkpoint and compare it with the manifest. A collective; the ranks share the files.

    Raises the same UserError on all ranks. It names a file that is missing or damaged, and says what to do (`hint`).
    """
    files = read_on_first(lambda: read_manifest(checkpoint, hint), ranks)["files"]
    problem = None
    for name in sorted(files)[ranks.rank :: ranks.world_size]:
        try:
            with CheckedFile(checkpoint / name, files[name], hint) as file:
                file.check()
        except UserError as error:
            problem = problem or str(error)
    problems = list(filter(None, gather_objects(problem, ranks)))
    if problems:
        raise UserError(problems[0])


def find_checkpoint(directory: Path, resume: str, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """(the whole checkpoint to continue from, or None if there is none yet; what was passed over). A collective.

    `resume` is run.resume. With `previous` all files are read, damaged checkpoints are passed over, and `latest` is set to
    the newest whole one. Otherwise only the sizes of files are looked at: whoever loads the checkpoint compares what it
    reads. Damage raises UserError, the same on all ranks.
    """
    if resume != "previous":
        checkpoint = read_on_first(lambda: latest_checkpoint(directory), ranks)
        if checkpoint:
            read_on_first(lambda: check_files(checkpoint), ranks)
        return checkpoint, []
    passed_over = []
    for checkpoint in read_on_first(lambda: complete_checkpoints(directory)[::-1], ranks):
        try:
            check_whole(checkpoint, ranks)
        except UserError as error:  # the same on all ranks
            passed_over.append(str(error).removesuffix(f"; {PREVIOUS}"))
            continue
        read_on_first(functools.partial(set_latest, directory, checkpoint), ranks)
        return checkpoint, passed_over
    if not passed_over and read_on_first((directory / "latest").exists, ranks):
        raise UserError(
            f"{directory} has no checkpoint, but the file `latest` says that there was one; to start from the base model, "
            "choose another run.name"
        )
    if passed_over:
        raise UserError(
            f"{directory} has no whole checkpoint ({'; '.join(passed_over)}); to start from the base model, choose another "
            "run.name"
        )
    return None, []


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that `latest` names, or None before the first. Raises UserError if there is no such checkpoint."""
    pointer = directory / "latest"
    if not pointer.is_file():
        complete = complete_checkpoints(directory)
        return complete[-1] if complete else None  # killed between the first rename and `latest`
    name = pointer.read_bytes().decode("utf-8", errors="backslashreplace").strip()
    if not _is_complete_name(name) or not (directory / name).is_dir():
        raise UserError(f"{pointer} names {name[:80]!r}, which does not exist; {PREVIOUS}")
    return directory / name


def weights_digest(checkpoint: Path) -> str | None:
    """Tells the tensors of two checkpoints apart, by the checksums of their files. None if there is no such checkpoint."""
    try:
        return _checksum(read_manifest(checkpoint)["files"])
    except UserError:
        return None


def set_latest(directory: Path, checkpoint: Path) -> None:
    """Let the run continue from `checkpoint`. Call it on rank 0 alone."""
    write_durably(directory / "latest", checkpoint.name)


def complete_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints, whole or damaged, the oldest first."""
    found = [path for path in directory.glob("step-*") if _is_complete_name(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def prune(directory: Path, keep_last: int) -> None:
    """Remove all checkpoints but the newest `keep_last` and those that their states name: the best, and the proven one.

    Checkpoints above `latest` belong to a future that was given up, and go. A checkpoint loses its name before its files
    are removed, so that a kill leaves no half checkpoint under a complete name. Call it on rank 0 alone.
    """
    newest = latest_checkpoint(directory)
    assert newest is not None
    complete = complete_checkpoints(directory)
    keep = {path for path in complete if _step(path) <= _step(newest)}
    keep = set(sorted(keep, key=_step)[-keep_last:]) | {newest}
    for path in list(keep):
        try:
            state = read_manifest(path)["state"]
        except UserError:
            continue  # a damaged one; nothing can be known about it
        named = (state.get("best_step"), state.get("proven_step"))
        keep |= {directory / checkpoint_name(step) for step in named if step}
    for path in complete:
        if path not in keep:
            path.replace(temporary_path(path))
    for path in directory.glob(f"step-*{SUFFIX}"):
        if re.fullmatch(r"step-\d{6,}(\.old)?" + re.escape(SUFFIX), path.name):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)


def set_aside_after(directory: Path, step: int) -> list[str]:
    """Rename the checkpoints after `step` to NAME.bad, and continue from `step` (0: from the base model).

    Returns their new names. Call it on rank 0 alone.
    """
    later = [path for path in complete_checkpoints(directory) if _step(path) > step]
    if step:
        set_latest(directory, directory / checkpoint_name(step))
    for path in reversed(later):  # a kill in between leaves the older ones, from which the run comes here again
        aside = path.with_name(path.name + SET_ASIDE)
        if aside.is_dir():
            shutil.rmtree(aside)
        path.replace(aside)
    if later and not step:
        (directory / "latest").unlink(missing_ok=True)
    return [path.name + SET_ASIDE for path in later]


def _is_complete_name(name: str) -> bool:
    return re.fullmatch(r"step-\d{6,}", name) is not None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _checksum(content: dict) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
