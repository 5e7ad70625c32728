"""The files that a setting such as data.train names, and the settings for reading them.

A run whose examples are in the cache needs only this module; the readers of files (data/formats.py) are then not imported.
"""

import glob
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from common.errors import UserError
from configs.config import Data, Source
from configs.load import EXAMPLE_FIELDS, MESSAGE_FIELDS
from data.store import STORE_FILE

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
CODECS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
KINDS = f"data files are {', '.join(SUFFIXES)}, each also compressed as {', '.join(CODECS)}"
ARTIFACTS_HINT = "the first lines of a config name the commands that make what it reads in artifacts/"
DATASET, SPLITS = "state.json", "dataset_dict.json"  # files that the library `datasets` writes beside saved data
# A dataset of the hub, or a folder laid out like one: NAME@REVISION:CONFIG:SPLIT
DATASET_NAME = re.compile(r"(?P<name>[^:@]+)(@(?P<revision>[\w./-]+))?((:(?P<config>[\w.-]+))?:(?P<split>[\w.-]+))?")
HELD_OUT = {"test", "validation", "valid", "dev", "eval"}  # words in names of files that are not for training
# Keys without a counterpart, read only to be refused: KTO's label of accepted and rejected answers, TRL's template options of a
# single row, and TRL's masks of token ids.
KTO_LABEL, ROW_OPTIONS, *TRL_MASKS = FOREIGN = ("label", "chat_template_kwargs", "assistant_masks", "completion_mask")
# Keys of preference data (data/preferences.py), read unless data.format names the form.
CHOSEN, REJECTED, SCORED_ANSWERS = PREFERENCES = ("chosen", "rejected", "completions")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Reading:
    """How files are read, and which of their examples: the settings of data with these names."""

    format: str = "auto"
    fields: dict[str, str] = field(default_factory=dict)  # our name -> the file's name
    on_bad: str = "error"
    split_by: str | None = None  # a key that belongs to no form
    row: str | None = None  # MODULE:FUNCTION, which turns a row into an example
    max_samples: int | None = None  # rows to read, counted over all files
    validation_share: float = 0.0
    part: str = "all"  # all | training | validation: which side of validation_share to read
    all_columns: bool = False  # also read the columns of .parquet and .arrow files that belong to no form

    @cached_property
    def example_names(self) -> dict[str, str]:
        """The entries of `fields` for keys of examples."""
        return {ours: theirs for ours, theirs in self.fields.items() if ours in EXAMPLE_FIELDS}

    @cached_property
    def message_names(self) -> dict[str, str]:
        """The entries of `fields` for keys of messages."""
        return {ours: theirs for ours, theirs in self.fields.items() if ours in MESSAGE_FIELDS}

    @cached_property
    def columns(self) -> frozenset[str] | None:
        """The columns to read, by the file's names: those of any form and `split_by`. None: all, as `row` may use any."""
        more = [*FOREIGN, *([self.split_by] if self.split_by else [])]
        more += PREFERENCES if self.format == "auto" and CHOSEN not in self.fields.values() else ()
        return None if self.row or self.all_columns else frozenset([*map(self.name_of, EXAMPLE_FIELDS), *more])

    def name_of(self, key: str) -> str:
        """Return the file's name for a key of an example."""
        return self.example_names.get(key) or key


DEFAULT = Reading()


def reading_of(source: Data | Source, on_bad: str) -> Reading:
    """Return how to read the files of data.train or of a source of data.mix."""
    reading = Reading(source.format, source.fields, on_bad, None, source.row, source.max_samples)
    if isinstance(source, Data):
        return replace(reading, split_by=source.split_by, validation_share=source.validation_share)
    return reading


def data_suffix(path: str | Path) -> str:
    """Return the suffix of a file or URL in lower case, without the compression suffix: `.txt` for a.TXT.gz."""
    name = _plain_name(path)
    return Path(name.stem if codec_of(path) else name).suffix.lower()


def codec_of(path: str | Path) -> str | None:
    """Return the compression of a file by the end of its name: gzip, bz2, xz, zstd or None."""
    return CODECS.get(_plain_name(path).suffix.lower())


def _plain_name(path: str | Path) -> Path:
    """Return a path, or a URL without its query (from `?` on)."""
    return Path(str(path).partition("?")[0] if "://" in str(path) else path)


def is_elsewhere(path: str | Path) -> bool:
    """Return whether data/remote.py must find the files: for a URL, a dataset of the hub, or a split of a folder."""
    text = str(path)
    if "://" in text or os.path.lexists(text) or glob.has_magic(text):
        return "://" in text
    match = DATASET_NAME.fullmatch(text)
    if not match:
        return False
    if os.path.isdir(match["name"]):
        return match["split"] is not None
    # A name that ends like a data file, or stands in an existing folder, is probably a mistyped path.
    is_path = data_suffix(match["name"]) in SUFFIXES or os.path.isdir(os.path.dirname(match["name"]))
    return bool(HUB_NAME.fullmatch(match["name"])) and not is_path


def check_paths_exist(paths: Iterable[str | Path]) -> None:
    """Raise UserError for the first path or glob that does not exist. Call this before a slow read of the first file.

    Remote paths are not checked.
    """
    for path in paths:
        if is_elsewhere(path):
            continue
        if not _is_glob(path):
            _mode(Path(path), f"; {ARTIFACTS_HINT if Path(path).parts[:1] == ('artifacts',) else KINDS}")
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
    """Return the files of `paths`: in the order of `paths`, and sorted within a folder or glob.

    A folder stands for all data files in it and below. A folder saved by the library `datasets` stands for its .arrow files.
    Hidden files are ignored. Raise UserError if a path has no data file.
    """
    return [file for path in paths for file in _files_of(path)[0]]


def left_out(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files in folders that `expand` leaves out because they do not have the suffix of a data file."""
    return [file for path in paths for file in _files_of(path)[1]]


def _files_of(path: str | Path) -> tuple[list[Path], list[Path]]:
    """Return (data files, files of another kind) of a path, a folder or a glob."""
    if is_elsewhere(path):
        raise UserError(
            f"{path} is not on this machine; only data.train, data.validation, data.mix and ewc.data fetch files"
        )
    check_paths_exist([path])
    matches = sorted(map(Path, glob.glob(str(path), recursive=True))) if _is_glob(path) else [Path(path)]
    files: list[Path] = []
    unknown: list[Path] = []
    # Visit a file once, even if `**` follows a link to a folder above.
    for match in sorted({match.parent.resolve() / match.name: match for match in reversed(matches)}.values()):
        if match.is_dir():
            # `**` matches both the folders and the files in them.
            if not (_is_glob(path) and "**" in str(path)):
                _add_folder(match, files, unknown)
        else:
            check_files([match])
            files.append(match)
    if not files:
        raise UserError(f"{path} contains no data files; {KINDS}")
    return files, unknown


def _add_folder(top: Path, files: list[Path], unknown: list[Path]) -> None:
    """Add the files in and below a folder, each once, even if a link leads to a folder above."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror or error}") from error

    seen: set[str] = set()
    files_below: list[Path] = []
    for root, folders, names in os.walk(top, followlinks=True, onerror=unreadable):
        folder, real = Path(root), os.path.realpath(root)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real in seen:
            continue
        seen.add(real)
        if STORE_FILE in names:
            raise UserError(f"{folder} is a token store, which must be the only path of its source; add it to data.mix")
        if SPLITS in names:
            raise UserError(f"{folder} is a saved dataset of several splits; name the folder of one")
        if folder == top and "README.md" in names and _names_splits(folder / "README.md"):
            raise UserError(f"{folder} is a dataset with a card that names its files; name a split: {folder}:train")
        if DATASET in names and "dataset_info.json" in names:
            folders.clear()
            files_below += _dataset_files(folder)
        else:
            files_below += [folder / name for name in names if not name.startswith(".")]
    # Sort by path, with folders and files together.
    files_below.sort(key=lambda file: file.parts)
    data = [file for file in files_below if data_suffix(file) in SUFFIXES]
    check_files(data)
    # Names such as train- and test- tell training files from held-out ones.
    parts = {file: set(re.split(r"[^a-z]+", str(file.relative_to(top)).lower())) for file in data}
    held_out = next((file for file, words in parts.items() if words & HELD_OUT and "train" not in words), None)
    if held_out and any("train" in words for words in parts.values()):
        raise UserError(
            f"{top} has training files and {held_out.relative_to(top)}; name a split, {top}:train, or the files that you mean"
        )
    files += data
    unknown += [file for file in files_below if data_suffix(file) not in SUFFIXES]


def _names_splits(card: Path) -> bool:
    """Return whether a dataset's card assigns files to splits."""
    head = card.read_bytes()[: 2**16].decode(errors="replace").split("\n---", 1)[0]
    return head.startswith("---") and bool(re.search(r"^\s*-?\s*split:", head, re.MULTILINE))


def _dataset_files(folder: Path) -> list[Path]:
    """Return the files of a dataset saved with `save_to_disk`, in order."""
    state = folder / DATASET
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        names = [file["filename"] for file in content["_data_files"]]
        if content.get("_indices_data_files"):
            raise UserError(f"{folder} was saved by an old version of `datasets`, with indices; save it again")
        return [folder / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{state} is damaged ({error!r}); save the dataset again") from error


def _is_glob(path: str | Path) -> bool:
    """Return whether a path is a pattern. An existing file whose name looks like a pattern is none."""
    return glob.has_magic(str(path)) and not Path(path).exists()


def _mode(path: Path, hint: str = "") -> int:
    """Return the type and permissions of a path. Raise UserError if it does not exist."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = "is a broken symbolic link" if path.is_symlink() else "does not exist"
        raise UserError(f"{path} {problem}{hint}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
