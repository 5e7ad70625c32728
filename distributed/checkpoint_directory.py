"""The checkpoints of a run on disk: names, manifests, checksums, the newest whole one, pruning, and the room that they need.

    checkpoints/step-000120/   .metadata, __<rank>_0.distcp (torch.distributed.checkpoint), manifest.json

manifest.json is written last. It holds the saved state (JSON of the loop), the plain values of the optimizer and of registered
objects, and for every other file its size and a SHA-256 per 16 MiB. One more SHA-256 covers the manifest itself. The state
names the best checkpoint, so that a single file, replaced atomically, describes the run.

A directory named `step-<digits>` is complete, because its name comes from a rename; the name of an interrupted one ends in
`.tmp`. A run continues from the complete checkpoint with the largest number. A checkpoint is whole if all of its files have the
size and the checksums of the manifest. torch.distributed.checkpoint (DCP) reads parts of files, and different parts on another
number of ranks: with a checksum per block, a rank verifies the bytes that it uses in the same read.

record.jsonl (training/checkpointer.py) gets an entry before a checkpoint gets its name, and before it loses its name, so each
name of a checkpoint that a kill leaves behind has an entry.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata

from common.durable_files import SUFFIX, sha256_of_json, temporary_path, write_json
from common.errors import UnknownFormat, UserError
from distributed.checkpoint_index import NOT_A_TENSOR, read_index
from distributed.process_group import Ranks, call_on_all, gather_objects, read_on_first

MANIFEST, INDEX = "manifest.json", ".metadata"
COMPLETE = r"step-\d{6,}"  # the name of a complete checkpoint
SET_ASIDE = ".bad"  # suffix of checkpoints from which no run continues, and which no save removes
PREVIOUS = "run.resume=previous continues from the newest whole checkpoint"
FORMAT = 1  # of manifest.json
BLOCK = 2**24  # bytes that share a checksum
LARGE = 2**20  # bytes: threads hash a larger write while it is written
HASHERS = 2  # threads: one hashes 1 to 2 GB/s, and memory copies faster
# Blocks of an open file that stay in memory. torch.load looks at the beginning and at the end of a tensor before it reads it, and
# each may lie on two blocks.
KEPT = 4
ALSO_KEPT = 2  # checkpoints beside run.keep_last: the best one and the proven one (`prune`)
TORCHRUN_GRACE = 30.0  # seconds between SIGTERM and SIGKILL, torchrun's default
Append = Callable[..., str]
"""`Record.append` (training/checkpointer.py), which appends an entry and returns its SHA-256. For rank 0 alone."""


# --- The files of a checkpoint ----------------------------------------------------------------------------------------


class CheckpointWriter(dcp.FileSystemWriter):
    """DCP's writer, which also computes the checksums of the files that this process writes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self.written: dict[str, _SummedFile] = {}
        self.hasher = ThreadPoolExecutor(HASHERS, thread_name_prefix="hash")
        self.fs = _Files(self._create)

    def entries(self) -> dict[str, dict]:
        """Return file name -> entry in the manifest, plain JSON, of the files that this process has written."""
        self.hasher.shutdown()
        return {name: {"size": f.size, "block": BLOCK, "sha256": f.sums()} for name, f in self.written.items()}

    def _create(self, path: Path) -> "_SummedFile":
        name = path.name.removesuffix(".tmp")  # DCP renames .metadata.tmp
        self.written[name] = _SummedFile(path, self.hasher)
        return self.written[name]


class CheckpointReader(dcp.FileSystemReader):
    """DCP's reader. It reads the index only once, because that takes longer than reading a tensor.

    files: the entries of the manifest, with which all bytes are compared; None: no byte is compared. Raise UserError, which ends
    with `hint`, for a damaged part and for an index that names anything but tensors.
    """

    def __init__(self, checkpoint: Path, files: dict[str, dict] | None = None, hint: str = PREVIOUS) -> None:
        super().__init__(checkpoint)
        self.hint = hint
        if files is not None:
            self.fs = _Files(lambda path: io.BufferedReader(CheckedFile(path, files[path.name], hint)))
        sizes = [entry["size"] for entry in (files or {}).values()]
        self.num_bytes = sum(sizes or [path.stat().st_size for path in checkpoint.glob("*.distcp")])
        with self.fs.create_stream(checkpoint / INDEX, "rb") as file:
            try:
                self.metadata = read_index(file, self.num_bytes)
            except (UserError, OSError):
                raise
            except Exception as error:  # whoever wrote the file decides which
                raise UserError(
                    f"{checkpoint / INDEX} is not an index that torch.distributed.checkpoint writes ({error}); {hint}"
                ) from error

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Return the index that was read when the reader was created."""
        return self.metadata

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Any:
        """Read in the order of the bytes, so that every block is read once. Raise UserError if a file does not hold its tensors."""

        def place(item: Any) -> tuple[str, int]:
            info = self.storage_data[item.storage_index]
            return info.relative_path, info.offset

        try:
            return super().read_data(dataclasses.replace(plan, items=sorted(plan.items, key=place)), planner)
        except NOT_A_TENSOR as error:
            raise UserError(
                f"{self.path} does not hold the tensors of its {INDEX} ({type(error).__name__}); {self.hint}"
            ) from error


class _Files(FileSystem):
    """DCP's file system with files that `open_file` opens."""

    def __init__(self, open_file: Callable[[Path], Any]) -> None:
        self.open_file = open_file

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with self.open_file(Path(path)) as file:
            yield file


class _SummedFile(io.BufferedWriter):
    """A file that DCP appends to, with its size and the checksums of its blocks so far.

    Threads hash the blocks of a large write while the system copies its bytes. The bytes belong to DCP and are gone when
    `write` returns.
    """

    def __init__(self, path: Path, hasher: ThreadPoolExecutor) -> None:
        super().__init__(path.open("wb", buffering=0))  # pyright: ignore[reportArgumentType]  it is an io.FileIO
        self.hasher, self.size, self.blocks = hasher, 0, []

    def sums(self) -> list[str]:
        """Return the SHA-256 of each block, as hexadecimal digits."""
        return [block.hexdigest() for block in self.blocks]

    def write(self, data: Any) -> int:
        """Write all of `data` and hash its blocks. Return the number of bytes."""
        rest, hashing = memoryview(data).cast("B"), []
        is_large = len(rest) >= LARGE
        while rest:
            done = self.size % BLOCK
            if not done:
                self.blocks.append(hashlib.sha256())
            part, rest = rest[: BLOCK - done], rest[BLOCK - done :]
            self.size += len(part)
            if is_large:
                hashing.append(self.hasher.submit(self.blocks[-1].update, part))
            else:
                self.blocks[-1].update(part)
        try:
            return super().write(data)
        finally:
            for future in hashing:
                future.result()

    def fileno(self) -> int:
        """Flush first: DCP calls this to fsync the file, without the bytes that are still in this buffer."""
        self.flush()
        return super().fileno()


class CheckedFile(io.RawIOBase):
    """A checkpoint's file for reading, block by block. A damaged file raises UserError, which ends with `hint`."""

    def __init__(self, path: Path, entry: dict, hint: str) -> None:
        self.path, self.entry, self.hint = path, entry, hint
        self.position, self.blocks = 0, {}
        if not path.is_file():
            raise UserError(f"{path} is missing; {hint}")
        size = path.stat().st_size
        if size != entry["size"]:
            raise UserError(f"{path} is damaged: it has {size:,} bytes instead of {entry['size']:,}; {hint}")
        try:
            self.file = path.open("rb", buffering=0)
        except OSError as error:  # such as a file of another user
            raise UserError(f"{path} cannot be read ({error.strerror}); {hint}") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.entry["size"]}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        number, start = divmod(self.position, self.entry["block"])
        if self.position >= self.entry["size"]:
            return 0
        part = self._block(number)[start : start + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)

    def check(self) -> None:
        """Read the whole file. Raise UserError if it is damaged."""
        for number in range(len(self.entry["sha256"])):
            self._block(number)

    def close(self) -> None:
        self.file.close()
        super().close()

    def _block(self, number: int) -> memoryview:
        if number not in self.blocks:
            while len(self.blocks) >= KEPT:
                del self.blocks[min(self.blocks)]  # reading goes forward
            try:
                self.file.seek(number * self.entry["block"])
                size = min(self.entry["block"], self.entry["size"] - self.file.tell())
                data = memoryview(bytearray(size))
                while data[:size] and (count := self.file.readinto(data[-size:])):
                    size -= count
            except OSError as error:  # the disk cannot read a block
                raise UserError(f"{self.path} cannot be read ({error.strerror}); {self.hint}") from error
            digest, stated = hashlib.sha256(data).hexdigest(), self.entry["sha256"][number]
            if digest != stated:
                raise UserError(
                    f"{self.path} is damaged: its checksum is {digest[:16]} instead of {stated[:16]}; {self.hint}"
                )
            self.blocks[number] = data
        return self.blocks[number]


# --- The directory ----------------------------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint of a step."""
    return f"step-{step:06d}"


def write_manifest(folder: Path, state: dict, files: dict[str, dict], values: dict) -> dict[str, str]:
    """Write manifest.json, the last file of a checkpoint, and return its `digests`. files: from `CheckpointWriter.entries`."""
    content = manifest_of(state, files, values)
    write_json(folder / MANIFEST, content)
    return digests(content)


def manifest_of(state: dict, files: dict[str, dict], values: dict) -> dict:
    """Return the content of manifest.json."""
    # Through JSON, so that the checksum is of the content as it will be read.
    content = json.loads(json.dumps({"format": FORMAT, "state": state, "values": values, "files": files}))
    return content | {"checksum": checksum(content)}


def digests(content: dict) -> dict[str, str]:
    """Return the part of the record's entry that identifies a checkpoint: the SHA-256 of manifest.json and `tensors_digest`."""
    return {"manifest": sha256_of_json(content), "tensors": tensors_digest(content)}


def tensors_digest(manifest: dict) -> str:
    """Return a SHA-256 of all tensors and plain values: equal if the same number of ranks repeats the same steps.

    It hashes the checksums of the files, without DCP's index, which holds a random number.
    """
    files = {name: entry for name, entry in manifest["files"].items() if name != INDEX}
    return checksum([files, manifest["values"]])


def read_manifest(checkpoint: Path, hint: str = PREVIOUS) -> dict:
    """Return the content of manifest.json: `format`, `state`, `values` and `files`.

    Raise UserError, which ends with `hint`, if the manifest is missing or damaged. Raise UnknownFormat if it is whole and has
    another format.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise UserError(f"{path} is missing: the checkpoint is damaged; {hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_whole = content.pop("checksum") == checksum(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {hint}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        is_whole, content = False, {}
    if not is_whole:
        raise UserError(f"{path} is damaged: its content does not match its checksum; {hint}")
    if content.get("format") != FORMAT:
        raise UnknownFormat(
            f"{path} has format {content.get('format')}, and this version of the code reads format {FORMAT}: continue with the "
            "version that wrote it, or choose another run.name"
        )
    return content


def checksum(content: object) -> str:
    """Return the SHA-256, as hexadecimal digits, of plain JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def marks_of(checkpoint: Path) -> dict[str, str | None]:
    """Return the two marks that identify a checkpoint: `checkpoint`, the digest of its tensors, and `identity`, the
    fingerprint of the run that trained it. Both are None if there is no such checkpoint.
    """
    try:
        manifest = read_manifest(checkpoint)
    except UserError:
        return {"checkpoint": None, "identity": None}
    return {"checkpoint": tensors_digest(manifest), "identity": checksum(manifest["state"]["identity"])}


def replace_state(checkpoint: Path, state: dict, append: Append, **entry: Any) -> None:
    """Replace the saved state of a checkpoint atomically, after a new entry in the record. For rank 0 alone."""
    old = read_manifest(checkpoint)
    content = manifest_of(state, old["files"], old["values"])
    append("checkpoint", **digests(content), **entry)
    write_json(checkpoint / MANIFEST, content)


def check_whole(checkpoint: Path, ranks: Ranks, hint: str = PREVIOUS) -> None:
    """Compare every file of a checkpoint with the manifest. Every rank must call this; the ranks share the files.

    Raise the same UserError on all ranks if a file is missing or damaged. It names the file and ends with `hint`.
    """
    files = read_on_first(lambda: read_manifest(checkpoint, hint), ranks)["files"]

    def check() -> None:
        for name in sorted(files)[ranks.rank :: ranks.world_size]:
            with CheckedFile(checkpoint / name, files[name], hint) as file:
                file.check()

    call_on_all(check, ranks)


def find_checkpoint(directory: Path, resume: str, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to continue from (None before the first), and a sentence for each damaged one that was passed over.

    With run.resume=`previous` all files are read, and damaged checkpoints are passed over. Otherwise the load of the newest
    checkpoint will compare the bytes that it reads. Every rank must call this. Raise UserError on all ranks if there are
    checkpoints but none is whole, and UnknownFormat if the newest whole manifest has another format.
    """
    if resume != "previous":
        return read_on_first(lambda: latest_checkpoint(directory), ranks), []
    passed_over = []
    for checkpoint in read_on_first(lambda: complete_checkpoints(directory)[::-1], ranks):
        try:
            check_whole(checkpoint, ranks)
        except UnknownFormat:  # passing it over would set it aside, and lose its steps
            raise
        except UserError as error:  # the same on all ranks
            passed_over.append(str(error).removesuffix(f"; {PREVIOUS}"))
            continue
        return checkpoint, passed_over
    if passed_over:
        why = "; ".join(passed_over)
        raise UserError(
            f"{directory} has no whole checkpoint ({why}); to start from the base model, choose another run.name"
        )
    return None, []


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint from which the run continues, or None before the first."""
    complete = complete_checkpoints(directory)
    return complete[-1] if complete else None


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints, whole or damaged, the oldest first."""
    complete = [path for path in directory.glob("step-*") if re.fullmatch(COMPLETE, path.name) and path.is_dir()]
    return sorted(complete, key=step_of)


def prune(directory: Path, keep_last: int, append: Append) -> str | None:
    """Remove all checkpoints except the newest `keep_last` and the best and proven ones that their states name.

    A checkpoint loses its name before its files are removed. Return the SHA-256 of the record's entry if a checkpoint was
    removed, else None. For rank 0 alone.
    """
    complete = complete_checkpoints(directory)
    keep = set(complete[-keep_last:])
    removes = keep < set(complete)  # else the manifests, as many as saves, need not be read
    for path in list(keep) if removes else ():
        with suppress(UserError):  # a damaged manifest names no checkpoint
            state = read_manifest(path)["state"]
            named = (state.get("best_step"), state.get("proven_step"))
            keep |= {directory / checkpoint_name(step) for step in named if step}
    removable = [path for path in complete if path not in keep]
    head = append("pruning", removed=[path.name for path in removable]) if removable else None
    for path in removable:
        path.replace(temporary_path(path))
    for path in directory.glob(f"step-*{SUFFIX}"):
        if re.fullmatch(COMPLETE + r"(\.old)?" + re.escape(SUFFIX), path.name):
            # NFS keeps an open file under another name, and then the directory is not empty: the next save tries again.
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
    return head


def set_aside_after(directory: Path, step: int, append: Append, why: str) -> list[str]:
    """Rename the checkpoints after `step` to NAME.bad, so that the run continues from `step` (0: from the base model).

    Return their new names. For rank 0 alone.
    """
    later = [path for path in complete_checkpoints(directory) if step_of(path) > step]
    if later:
        append("pruning", set_aside=[path.name for path in later], why=why)
    for path in reversed(later):  # after a kill in between, the run continues from an older one and comes here again
        aside = path.with_name(path.name + SET_ASIDE)
        if aside.is_dir():
            shutil.rmtree(aside)
        path.replace(aside)
    return [path.name + SET_ASIDE for path in later]


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint from its name."""
    return int(checkpoint.name.removeprefix("step-"))


# --- Room on the disk, and time to save ---------------------------------------------------------------------------------


def check_free_space(directory: Path, size: int, ranks: Ranks, what: str) -> None:
    """Raise UserError on all ranks if a node has fewer than `size` bytes free where `directory` is or will be.

    what: who needs the room, for the message. Every rank must call this. No rank returns before all have entered, so files that
    rank 0 created before the call exist for all.
    """
    _check(directory, size, ranks, f"{what} needs {_size(size)}")


def check_room_for_run(directory: Path, checkpoint_bytes: int, export_bytes: int, keep_last: int, ranks: Ranks) -> str:
    """Return a line on whether the checkpoints and the export of a run will fit on its disk. Every rank must call this.

    directory: runs/NAME, which may not exist yet. Raise UserError on all ranks if there is no room for a new checkpoint beside
    the last one. The line is a warning if the kept checkpoints (`prune`), one being written and the export will not all fit.
    """
    saved = directory.glob("checkpoints/step-*[0-9]")  # without NAME.bad, which no save removes
    present = read_on_first(lambda: sum(map(_bytes_under, saved)), ranks)
    what = f"a checkpoint is {_size(checkpoint_bytes)} and the last one stays until a new one is complete"
    free, sentence = _check(
        directory / "checkpoints", max(checkpoint_bytes, 2 * checkpoint_bytes - present), ranks, what
    )
    kept = (keep_last + ALSO_KEPT) * checkpoint_bytes
    # An older export, too, stays until the new one is complete.
    needed = max(kept + checkpoint_bytes - present, max(kept - present, 0) + export_bytes, 0)
    if needed <= free:
        return f"a save writes {_size(checkpoint_bytes)}; {sentence}"
    return (
        f"warning: {keep_last} checkpoints (run.keep_last), the best, the last good one, one being written "
        f"({_size(checkpoint_bytes)} each) and the export ({_size(export_bytes)}) need {_size(needed)} more in {directory}, and "
        f"{sentence}; the run stops with a sentence when a save does not fit"
    )


def torchrun_grace() -> float | None:
    """Return the seconds that torchrun grants between SIGTERM and SIGKILL; None without torchrun.

    The ranks see a value from the environment, but not from --shutdown-timeout.
    https://docs.pytorch.org/docs/stable/elastic/run.html
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    default = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TORCHRUN_GRACE)
    return float(os.environ.get("PET_SHUTDOWN_TIMEOUT", default))


def _check(directory: Path, size: int, ranks: Ranks, what: str) -> tuple[int, str]:
    """Return the smallest free space over the nodes, and a sentence on it.

    Raise UserError on all ranks if it is below `size`.
    """

    def free() -> tuple[int, str] | None:
        """Return the free bytes of this node and its host name, on its first rank."""
        if ranks.local_rank:
            return None
        host = socket.gethostname()
        try:
            existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
            space = shutil.disk_usage(existing).free
        except OSError as error:
            raise UserError(
                f"{directory} on host {host}: {error.strerror}; set run.directory to a disk that can be read"
            ) from error
        if not os.access(existing, os.W_OK):  # else the first save would notice, after the steps up to it
            raise UserError(
                f"{existing} on host {host} cannot be written to; look whose it is, and whether its disk is read-only"
            )
        return space, host

    answers = [answer for answer in gather_objects(call_on_all(free, ranks), ranks) if answer]
    smallest, host = min(answers)
    sentence = f"the disk{f' of host {host}' if len(answers) > 1 else ''} has {_size(smallest)} free"
    if smallest < size:
        raise UserError(
            f"{directory}: {what}, but {sentence}; free {_size(size - smallest)}, or set run.directory to another disk, and start "
            "again: the run continues from its last checkpoint"
        )
    return smallest, sentence


def _bytes_under(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def _size(num_bytes: float) -> str:
    """Return a size in words: 1536 * 2**20 -> 1.5 GiB."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
