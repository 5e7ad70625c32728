"""Where a base model comes from and under which licence, as far as its own directory says so. Nothing is guessed."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load

from model.download import MANIFEST, origin

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# Licences that are recognised by the heading of their text, with the hub's name of them
# (https://huggingface.co/docs/hub/repositories-licenses).
HEADINGS = {r"\s*Apache License\s+Version 2\.0": "apache-2.0", r"\s*MIT License": "mit"}
UNKNOWN = "unknown"


@dataclass(frozen=True)
class BaseModel:
    """What is known about a base model.

    hub_id: its id on the hub, or None. origin: the same in words. license: the hub's name of its licence, `other`, or
    UNKNOWN. license_from: which file says so, in words. metadata: license_name and license_link for `other`. extended:
    number of tokens that scripts/extend_vocabulary.py added.
    """

    hub_id: str | None
    origin: str
    license: str
    license_from: str
    metadata: dict[str, str]
    files: tuple[Path, ...]
    extended: int = 0

    def copy_licences(self, folder: Path) -> None:
        """Copy the texts of the licence, which many licences ask to keep with the weights."""
        for file in self.files:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def read_base_model(directory: Path | None) -> BaseModel:
    """What the directory of a base model says. None: the base model is unknown."""
    if directory is None or not directory.is_dir():
        where = "unknown: check" if directory is None else f"`{directory.name}`, a directory that is gone: check"
        return BaseModel(None, where, UNKNOWN, "the base model is not there", {}, ())
    extension = _json(directory / "new_tokens.json")
    source = directory
    if extension and Path(str(extension.get("base", ""))).is_dir():
        source = Path(extension["base"])
    hub_id, where = _origin(source)
    known, said, metadata = _licence(source)
    files = tuple(sorted(file for pattern in LICENCE_FILES for file in source.glob(pattern) if file.is_file()))
    return BaseModel(hub_id, where, known, said, metadata, files, len(extension.get("tokens", ())))


def _origin(directory: Path) -> tuple[str | None, str]:
    """(id on the hub, the origin in words)."""
    record = _json(directory / MANIFEST)
    if found := origin(directory):
        return str(record["model"]), found
    card = _front_matter(directory / "README.md")
    parent = card.get("base_model")
    if isinstance(parent, str) and parent:
        return None, f"`{directory.name}`, itself made from {parent} according to its card"
    return None, f"`{directory.name}`, a local directory that does not say where it is from: check"


def _licence(directory: Path) -> tuple[str, str, dict[str, str]]:
    """(the hub's name of the licence, which file says so, license_name and license_link)."""
    card = _front_matter(directory / "README.md")
    named = card.get("license")
    if isinstance(named, str) and named and named != UNKNOWN:
        extra = {key: str(card[key]) for key in ("license_name", "license_link") if card.get(key)}
        return named, "the card of the base model", extra
    texts = sorted([*directory.glob("LICENSE*"), *directory.glob("LICENCE*")])
    for file in texts:
        text = file.read_text(encoding="utf-8", errors="replace")
        for heading, name in HEADINGS.items():
            if re.match(heading, text):
                return name, f"{file.name} of the base model", {}
    if texts:
        name = texts[0].name
        return "other", f"{name} of the base model: read it", {"license_name": "see-file", "license_link": name}
    return UNKNOWN, "neither a card nor a LICENSE file is in the base model's directory: check", {}


def _front_matter(path: Path) -> dict:
    """The YAML at the top of a card; empty if there is none or it cannot be read."""
    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except Exception:  # what the YAML parser raises for a damaged card
        return {}


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
