"""Ways in which the files of a checkpoint go bad, to see that a resume notices each of them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096  # bytes


@dataclass(frozen=True)
class Damage:
    """One way. `apply(checkpoints)` damages the newest checkpoint, or `latest`, in a directory of checkpoints."""

    name: str
    file: str  # which the error must name
    apply: Callable[[Path], None]


def newest(checkpoints: Path) -> Path:
    """The checkpoint that `latest` names."""
    return checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()


def flip_bit(path: Path) -> None:
    """Invert one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_page(path: Path) -> None:
    """Overwrite one page with zeros: what a lost write leaves. Raises ValueError if the file has no page with content."""
    content = bytearray(path.read_bytes())
    for start in range(0, len(content), PAGE):
        if any(content[start : start + PAGE]) and start:
            content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
            path.write_bytes(content)
            return
    raise ValueError(f"{path} has only zeros")


def truncate(path: Path) -> None:
    """Cut off the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def change_state(path: Path) -> None:
    """Another number in the saved state, in valid JSON."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["state"]["step"] += 1
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _in_newest(change: Callable[[Path], None], file: str) -> Callable[[Path], None]:
    return lambda checkpoints: change(newest(checkpoints) / file)


DATA, OTHER_DATA, INDEX, MANIFEST = "__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"

DAMAGES = (
    Damage("a flipped bit in the tensors of rank 0", DATA, _in_newest(flip_bit, DATA)),
    Damage("a flipped bit in the tensors of rank 1", OTHER_DATA, _in_newest(flip_bit, OTHER_DATA)),
    Damage("a flipped bit in the index", INDEX, _in_newest(flip_bit, INDEX)),
    Damage("another step in the manifest", MANIFEST, _in_newest(change_state, MANIFEST)),
    Damage("a zeroed page", DATA, _in_newest(zero_page, DATA)),
    Damage("a truncated data file", OTHER_DATA, _in_newest(truncate, OTHER_DATA)),
    Damage("an empty data file", DATA, _in_newest(lambda path: path.write_bytes(b""), DATA)),
    Damage("a missing data file", OTHER_DATA, _in_newest(Path.unlink, OTHER_DATA)),
    Damage("a missing index", INDEX, _in_newest(Path.unlink, INDEX)),
    Damage("a truncated manifest", MANIFEST, _in_newest(truncate, MANIFEST)),
    Damage("a missing manifest", MANIFEST, _in_newest(Path.unlink, MANIFEST)),
    Damage("`latest` names a checkpoint that is gone", "latest", lambda c: shutil.rmtree(newest(c))),
    Damage("`latest` holds garbage", "latest", lambda c: (c / "latest").write_bytes(b"\xff\x00step\n")),
    Damage("`latest` is empty", "latest", lambda c: (c / "latest").write_bytes(b"")),
)
