"""Which files a setting such as data.train stands for: files, folders, globs and saved datasets."""

import glob
import json
import stat
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError
from data.compression import data_suffix
from data.rows import SUFFIXES
from data.store import STORE_FILE

KINDS = f"data files are {', '.join(SUFFIXES)}, each also compressed as .gz or .zst"
DATASET, SPLITS = "state.json", "dataset_dict.json"  # what the library `datasets` writes beside the data that it saves


def check_paths_exist(paths: Iterable[str | Path]) -> None:
    """Raise UserError for the first path or glob that does not exist. Call this before a slow read of the first file."""
    for path in paths:
        if not _is_glob(path):
            _mode(Path(path), f"; {KINDS}")
        elif not glob.glob(str(path), recursive=True):
            raise UserError(f"{path} matches no file; {KINDS}")


def check_files(paths: Iterable[str | Path]) -> None:
    """Raise UserError for the first path that does not exist or is not a file."""
    for path in map(Path, paths):
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            raise UserError(f"{path} is a directory; name the files in it instead")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path} is not a regular file")


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """The files that paths stand for: in the order of `paths`, and sorted within a folder or glob.

    A folder stands for all data files in it and below; one that the library `datasets` has saved stands for its .arrow
    files. Hidden files are not counted. Raises UserError if a path has no data file.
    """
    return [file for path in paths for file in _files_of(path)[0]]


def left_out(paths: Iterable[str | Path]) -> list[Path]:
    """The files in folders that `expand` leaves out because they do not have the suffix of a data file."""
    return [file for path in paths for file in _files_of(path)[1]]


def _files_of(path: str | Path) -> tuple[list[Path], list[Path]]:
    """(data files, other files) of a path, a folder or a glob."""
    check_paths_exist([path])
    matches = _matches(str(path)) if _is_glob(path) else [Path(path)]
    files: list[Path] = []
    others: list[Path] = []
    for match in matches:
        if match.is_dir():
            # `**` matches the folders and the files in them.
            if not (_is_glob(path) and "**" in str(path)):
                _walk(match, files, others, set())
        else:
            check_files([match])
            files.append(match)
    if not files:
        raise UserError(f"{path} contains no data files; {KINDS}")
    return files, others


def _matches(pattern: str) -> list[Path]:
    """The paths that match a pattern, sorted. Each is there once, even if `**` follows a link to a folder above."""
    found = sorted(map(Path, glob.glob(pattern, recursive=True)))
    return list({match.parent.resolve() / match.name: match for match in reversed(found)}.values())[::-1]


def _walk(folder: Path, files: list[Path], others: list[Path], seen: set[Path]) -> None:
    """Add the files of a folder and the folders below. seen: folders that are being walked, against endless links."""
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    if (folder / STORE_FILE).is_file():
        raise UserError(f"{folder} is a token store, which must be the only path of its source")
    if (folder / SPLITS).is_file():
        raise UserError(f"{folder} is a saved dataset of several splits; name one: {', '.join(_splits(folder))}")
    if (folder / DATASET).is_file() and (folder / "dataset_info.json").is_file():
        files += _dataset_files(folder)
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            _walk(entry, files, others, seen)
        elif data_suffix(entry) in SUFFIXES:
            check_files([entry])
            files.append(entry)
        else:
            others.append(entry)


def _dataset_files(folder: Path) -> list[Path]:
    """The files of a dataset that was saved with `save_to_disk`, in order."""
    state = folder / DATASET
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        names = [file["filename"] for file in content["_data_files"]]
        if content.get("_indices_data_files"):
            raise UserError(f"{folder} was saved by an old version of `datasets`, with indices; save it again")
        return [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{state} is damaged ({error!r}); save the dataset again") from error


def _splits(folder: Path) -> list[str]:
    return [str(entry.parent) for entry in sorted(folder.glob(f"*/{DATASET}"))] or ["none of them is there"]


def _is_glob(path: str | Path) -> bool:
    """Whether a path is a pattern. A file whose name merely looks like one is itself."""
    return glob.has_magic(str(path)) and not Path(path).exists()


def _mode(path: Path, hint: str = "") -> int:
    """The type and permissions of what is at a path. Raises UserError if nothing is there."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = "is a broken symbolic link" if path.is_symlink() else "does not exist"
        raise UserError(f"{path} {problem}{hint}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
