"""The safetensors files of a model directory: list their tensors and check that the files are complete.

Only headers and sizes are read, so a directory of any size is checked in a moment. The header contains the length of the file
(https://huggingface.co/docs/safetensors), so a file that was cut off or extended has the wrong size. Flipped bits inside the
data are detected only by `hash_weights`, which reads everything.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from model.weight_digests import remembered_sha256

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
AGAIN = "copy or download the model again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `dtype` is safetensors' name of it, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    name: str = ""

    @property
    def files(self) -> set[Path]:
        """The files that `read` needs."""
        return {self.file}

    def read(
        self, files: dict[Path, Any], dimension: int = 0, start: int = 0, length: int | None = None
    ) -> torch.Tensor:
        """Return the tensor, or `length` indices of `dimension` from `start` on. `files` has an open file for each of `self.files`."""
        tensor = files[self.file].get_slice(self.name)
        return tensor[...] if length is None else tensor[(slice(None),) * dimension + (slice(start, start + length),)]

    def copy(self) -> torch.Tensor:
        """Return the whole tensor in `dtype`."""
        with opened([self]) as files:
            return self.read(files)

    @property
    def num_bytes(self) -> int:
        """The size of the whole tensor. Names of dtypes contain the bits of an element, except for BOOL."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) // 8 if bits else 1)


@contextlib.contextmanager
def opened(tensors: Iterable[StoredTensor]) -> Iterator[dict[Path, Any]]:
    """Open the files of tensors, for `StoredTensor.read`."""
    with contextlib.ExitStack() as stack:
        files = {file for tensor in tensors for file in tensor.files}
        yield {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}


def stored_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Return tensor name -> file, dtype and shape, from the headers of all files of a model directory.

    Raises UserError if the directory has no safetensors file, if a file is missing, has the wrong size or no valid header,
    if the index names a tensor that its file does not have, or a file outside of the directory.
    """
    path = Path(path)
    index, single = path / INDEX, path / SINGLE
    if not index.is_file():
        if not single.is_file():
            raise UserError(f"{path} has neither {SINGLE} nor {INDEX}; {AGAIN}, or write one by save_pretrained")
        return _read_file(single)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        file_of = {name: path / file for name, file in sorted(weight_map.items())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index} is not a JSON object with a weight_map of tensor names to files ({error!r}); {AGAIN}"
        ) from error
    # Lexically: the cache of the hub links each file to a blob elsewhere.
    if outside := [file for file in weight_map.values() if ".." in Path(file).parts or Path(file).is_absolute()]:
        raise UserError(f"{index} names {outside[0]}, which is outside of its directory; {AGAIN}")
    tensors = {file: _read_file(file) for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        if name not in tensors[file]:
            raise UserError(f"{file} has no tensor {name}, which {index} says it has; {AGAIN}")
    return {name: tensors[file][name] for name, file in file_of.items()}


def hash_weights(path: str | Path, say: Callable[[str], None] = lambda text: None) -> dict[str, str]:
    """Return path in the directory -> SHA-256 of a model's weight files. A file is read again only after it has changed.

    `remembered_sha256` keeps the digests. Raises UserError as `stored_tensors` does.
    """
    files = sorted({tensor.file for tensor in stored_tensors(path).values()})
    return {file.relative_to(path).as_posix(): digest for file, digest in remembered_sha256(files, say).items()}


def _read_file(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name. Raises UserError if the file is damaged."""
    try:
        with open(file, "rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{file} is a pointer of Git LFS, not the weights; run `git lfs pull` in its directory")
        # safe_open checks the size, shapes and dtypes, and that the tensors neither overlap nor leave gaps.
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (it is no dictionary)
            return {name: StoredTensor(file, x.get_dtype(), tuple(x.get_shape()), name) for name, x in slices.items()}
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); {AGAIN}") from error
    except SafetensorError as error:
        reason = f"it has {file.stat().st_size:,} bytes, and safetensors says: {error}"
        raise UserError(f"{file} is cut off or not a safetensors file ({reason}); {AGAIN}") from error
