"""The safetensors files of a model directory: which tensor is in which file, and whether the files are whole.

Only headers and sizes are read, so a directory of any size is checked in a moment. A file begins with the length of its
header (8 bytes, little-endian), then the header in JSON, then the data of all tensors without gaps
(https://huggingface.co/docs/safetensors). A file that was cut off, or to which something was appended, therefore has the
wrong size. Flipped bits inside the data are not seen: the format has no checksum.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LENGTH_BYTES = 8  # at the beginning of a file
LFS_POINTER = b"version https://git-lfs"
AGAIN = "copy or download the model again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. dtype: in the words of safetensors, such as BF16. start, size: of its data, in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    size: int


def stored_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Tensor name -> where it is, from the headers of all files of a model directory.

    Raises UserError if the directory has no safetensors file, if a file is missing, has the wrong size or no valid header,
    or if index and files do not agree.
    """
    names_by_file = _names_by_file(Path(path))
    found: dict[str, StoredTensor] = {}
    for file, names in names_by_file.items():
        tensors = _read_file(file)
        if names is None:
            names = list(tensors)
        for name in names:
            if name not in tensors:
                raise UserError(f"{file} has no tensor {name}, which {Path(path) / INDEX} says it has; {AGAIN}")
            found[name] = tensors[name]
    return found


def tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it. Raises UserError as `stored_tensors` does."""
    return {name: tensor.file for name, tensor in stored_tensors(path).items()}


def _names_by_file(path: Path) -> dict[Path, list[str] | None]:
    """File -> the names of its tensors according to the index. None: all tensors of a model with one file."""
    index = path / INDEX
    if not index.is_file():
        if not (path / SINGLE).is_file():
            raise UserError(f"{path} has neither {SINGLE} nor {INDEX}; {AGAIN}")
        return {path / SINGLE: None}
    try:
        text = index.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(index, error) from error
    except UnicodeDecodeError:
        text = ""
    try:
        weight_map = json.loads(text)["weight_map"]
        by_file: dict[Path, list[str] | None] = {}
        for name, file in sorted(weight_map.items()):
            names = by_file.setdefault(path / file, [])
            assert names is not None
            names.append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is not a JSON object with a weight_map of tensor names to files ({error!r}); {AGAIN}"
        ) from error
    if not by_file:
        raise UserError(f"the weight_map of {index} is empty; {AGAIN}")
    for file in by_file:
        if not file.is_file():
            raise UserError(f"{file} does not exist, but {index} names it; {AGAIN}")
    return by_file


def _read_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises UserError if it is damaged."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            header_bytes = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            # safetensors itself allows at most 100 MB; what is longer is another kind of file, such as an error page.
            contents = opened.read(header_bytes) if header_bytes <= min(size, 100_000_000) else b""
    except OSError as error:
        raise _unreadable(file, error) from error
    if not contents and _begins_with(file, LFS_POINTER):
        raise UserError(f"{file} is a pointer of Git LFS, not the weights; run `git lfs pull` in its directory")
    try:
        header = json.loads(contents)
        header.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                file,
                str(entry["dtype"]),
                tuple(entry["shape"]),
                LENGTH_BYTES + header_bytes + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
        end = max((tensor.start + tensor.size for tensor in tensors.values()), default=LENGTH_BYTES + header_bytes)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{file} ({size:,} bytes) is not a safetensors file: it has no valid header; {AGAIN}"
        ) from error
    if size != end:
        what = "is cut off" if size < end else "has bytes that belong to no tensor"
        raise UserError(f"{file} {what}: it has {size:,} bytes instead of {end:,}; {AGAIN}")
    try:
        with safe_open(
            file, framework="pt"
        ):  # checks shapes, dtypes, and that the tensors neither overlap nor leave gaps
            return tensors
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}); {AGAIN}") from error


def _begins_with(file: Path, text: bytes) -> bool:
    with open(file, "rb") as opened:
        return opened.read(len(text)) == text


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file} cannot be read: {os.strerror(error.errno or 0)}")
