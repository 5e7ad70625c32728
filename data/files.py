"""Which files a setting such as data.train stands for, and the settings by which they are read.

A run whose examples are in the cache needs no more than this: what reads the files (data/formats.py) is imported where they
are read.
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
MADE = "the first lines of a config name the commands that make what it reads in artifacts/"
DATASET, SPLITS = "state.json", "dataset_dict.json"  # what the library `datasets` writes beside the data that it saves
# A dataset of the hub, or a folder that looks like one: NAME@REVISION:CONFIG:SPLIT
DATASET_NAME = re.compile(r"(?P<name>[^:@]+)(@(?P<revision>[\w./-]+))?((:(?P<config>[\w.-]+))?:(?P<split>[\w.-]+))?")
HELD_OUT = {"test", "validation", "valid", "dev", "eval"}  # words in the names of files that are not for training
# Keys that no form has, read to be refused: whether an answer is wanted (KTO), TRL's options of the template for one row,
# and what TRL calls the mask of token ids.
WANTED, ROW_OPTIONS, *TRL_MASKS = FOREIGN = ("label", "chat_template_kwargs", "assistant_masks", "completion_mask")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Reading:
    """How files are read, and which of their examples: the settings of data with these names."""

    format: str = "auto"
    fields: dict[str, str] = field(default_factory=dict)  # our name -> the name in the file
    on_bad: str = "error"
    split_by: str | None = None  # a key that no form has
    row: str | None = None  # MODULE:FUNCTION, which makes an example of a row
    max_samples: int | None = None  # rows read of all files together
    validation_share: float = 0.0
    part: str = "all"  # all | training | validation: which examples, if validation_share holds some out
    all_columns: bool = False  # of .parquet and .arrow files, also those that no form uses

    @cached_property
    def example_names(self) -> dict[str, str]:
        """The part of `fields` that is about the keys of examples."""
        return {ours: theirs for ours, theirs in self.fields.items() if ours in EXAMPLE_FIELDS}

    @cached_property
    def message_names(self) -> dict[str, str]:
        """The part of `fields` that is about the keys of messages."""
        return {ours: theirs for ours, theirs in self.fields.items() if ours in MESSAGE_FIELDS}

    @cached_property
    def columns(self) -> frozenset[str] | None:
        """The names in the file of all keys that any form or the split uses; None: all columns, as `row` may use any."""
        others = [*FOREIGN, *([self.split_by] if self.split_by else [])]
        return None if self.row or self.all_columns else frozenset([*map(self.name_of, EXAMPLE_FIELDS), *others])

    def name_of(self, key: str) -> str:
        """The name in the file of a key of an example."""
        return self.example_names.get(key) or key


DEFAULT = Reading()


def reading_of(source: Data | Source, on_bad: str) -> Reading:
    """How the files of data.train or of a source of data.mix are read."""
    reading = Reading(source.format, source.fields, on_bad, None, source.row, source.max_samples)
    if isinstance(source, Data):
        return replace(reading, split_by=source.split_by, validation_share=source.validation_share)
    return reading


def data_suffix(path: str | Path) -> str:
    """The suffix of a file or URL in lower case, without that of its compression: `.txt` for a.TXT.gz."""
    name = _plain_name(path)
    return Path(name.stem if codec_of(path) else name).suffix.lower()


def codec_of(path: str | Path) -> str | None:
    """How a file is compressed, by the end of its name: gzip, bz2, xz or zstd."""
    return CODECS.get(_plain_name(path).suffix.lower())


def _plain_name(path: str | Path) -> Path:
    """A path, or a URL without what stands behind its `?`."""
    return Path(str(path).partition("?")[0] if "://" in str(path) else path)


def is_elsewhere(path: str | Path) -> bool:
    """Whether data/remote.py must find the files of a path: a URL, a dataset of the hub, or a split of a folder."""
    text = str(path)
    if "://" in text or os.path.lexists(text) or glob.has_magic(text):
        return "://" in text
    named = DATASET_NAME.fullmatch(text)
    if not named:
        return False
    if os.path.isdir(named["name"]):
        return named["split"] is not None
    # A name with the suffix of a data file, or in a folder that exists, is rather a mistyped path.
    is_path = data_suffix(named["name"]) in SUFFIXES or os.path.isdir(os.path.dirname(named["name"]))
    return bool(HUB_NAME.fullmatch(named["name"])) and not is_path


def check_paths_exist(paths: Iterable[str | Path]) -> None:
    """Raise UserError for the first path or glob that does not exist. Call this before a slow read of the first file.

    What lies elsewhere is not looked for.
    """
    for path in paths:
        if is_elsewhere(path):
            continue
        if not _is_glob(path):
            _mode(Path(path), f"; {MADE if Path(path).parts[:1] == ('artifacts',) else KINDS}")
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
    if is_elsewhere(path):
        raise UserError(
            f"{path} is not on this machine; only data.train, data.validation, data.mix and ewc.data fetch files"
        )
    check_paths_exist([path])
    found = sorted(map(Path, glob.glob(str(path), recursive=True))) if _is_glob(path) else [Path(path)]
    files: list[Path] = []
    others: list[Path] = []
    # Each once, even if `**` follows a link to a folder above.
    for match in sorted({match.parent.resolve() / match.name: match for match in reversed(found)}.values()):
        if match.is_dir():
            # `**` matches the folders and the files in them.
            if not (_is_glob(path) and "**" in str(path)):
                _add_folder(match, files, others)
        else:
            check_files([match])
            files.append(match)
    if not files:
        raise UserError(f"{path} contains no data files; {KINDS}")
    return files, others


def _add_folder(top: Path, files: list[Path], others: list[Path]) -> None:
    """Add the files of a folder and of the folders below it, each of them once: a link may lead to a folder above."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror or error}") from error

    seen: set[str] = set()
    found: list[Path] = []
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
            found += _dataset_files(folder)
        else:
            found += [folder / name for name in names if not name.startswith(".")]
    # In the order of their names, folders among the files.
    found.sort(key=lambda file: file.parts)
    data = [file for file in found if data_suffix(file) in SUFFIXES]
    check_files(data)
    # Names may tell of training and of something held out: train- and test-.
    parts = {file: set(re.split(r"[^a-z]+", str(file.relative_to(top)).lower())) for file in data}
    held_out = next((file for file, words in parts.items() if words & HELD_OUT and "train" not in words), None)
    if held_out and any("train" in words for words in parts.values()):
        raise UserError(
            f"{top} has training files and {held_out.relative_to(top)}; name a split, {top}:train, or the files that you mean"
        )
    files += data
    others += [file for file in found if data_suffix(file) not in SUFFIXES]


def _names_splits(card: Path) -> bool:
    """Whether the card of a dataset says which files belong to which split."""
    head = card.read_bytes()[: 2**16].decode(errors="replace").split("\n---", 1)[0]
    return head.startswith("---") and bool(re.search(r"^\s*-?\s*split:", head, re.MULTILINE))


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
