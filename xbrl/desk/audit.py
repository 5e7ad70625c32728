"""What an analysis depended on: hashes of inputs, rules and code, the model's fingerprint, versions of libraries.

The key of an analysis is the hash of all of it but the inputs. A finished report is kept as long as its key and the hashes of
its files are the same.
"""

import hashlib
import importlib.metadata
import json
import platform
import tomllib
from pathlib import Path

from common.errors import UserError
from xbrl.read.dpm import load_cells
from xbrl.rules.findings import NOTE_RULES_FILE
from xbrl.rules.rules import RULES_FILE

ROOT = Path(__file__).resolve().parents[2]
CODE = ("common", "xbrl", "eval")  # everything that an analysis without a model runs
SUFFIXES = (".py", ".jsonl", ".json", ".csv", ".css", ".toml", ".jinja")  # of code, rules, blocks and pages
LIBRARIES = ("arelle-release", "jinja2", "lxml")
MODEL_LIBRARIES = ("numpy", "tokenizers", "torch", "transformers")
AUDIT_FILE = "audit.json"


def versions(model: Path | None = None) -> dict:
    """Versions and hashes, as plain JSON. With a model directory also its fingerprints and the libraries that run it."""
    found = {
        "project": tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"],
        "code": hash_of_code(),
        "rules": hash_of_file(RULES_FILE),
        "note_rules": hash_of_file(NOTE_RULES_FILE),
        "cells": hash_of_file(load_cells().path),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in (*LIBRARIES, *(MODEL_LIBRARIES if model else ()))},
    }
    if model:
        from model.fingerprint import fingerprint_of_base  # imports transformers

        found["model"] = {"path": str(model), "fingerprint": fingerprint_of_base(model), "files": _small_files(model)}
    return found


def key_of(versions: dict, options: dict) -> str:
    """The key of an analysis. Where the model lies does not matter."""
    parts = json.loads(json.dumps([versions, options], default=str))
    if "model" in parts[0]:
        del parts[0]["model"]["path"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def hash_of_code() -> str:
    """SHA-256 over the source files, whatever git says."""
    folders = [ROOT / name for name in CODE]
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {hash_of_file(path)}\n".encode())
    return digest.hexdigest()


def hash_of_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_input(path: Path) -> str:
    """SHA-256 of a report: of a file, or over all files of an unpacked package. Raises UserError if it cannot be read.

    The metadata file of an unpacked xBRL-CSV report stands for the folder that it lies in: the tables are beside it.
    """
    try:
        if path.suffix.lower() == ".json" and (path.parent / "parameters.csv").is_file():
            path = path.parent
        if not path.is_dir():
            return hash_of_file(path)
        digest = hashlib.sha256()
        for part in sorted(path.rglob("*")):
            if part.is_file():
                digest.update(f"{part.relative_to(path).as_posix()} {hash_of_file(part)}\n".encode())
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _small_files(model: Path) -> dict[str, str]:
    """Hash of each file beside the weights that changes answers: config, tokenizer, chat template, generation."""
    return {
        path.name: hash_of_file(path)
        for path in sorted(model.iterdir())
        if path.suffix in (".json", ".jinja", ".model")
    }
