"""Measure memory and start-up time of training from token stores of several sizes.

FILES are tokenised once. A store of each size is made by repeating their shards as hard links, so it has the content of
the same texts written out many times. For each size a fresh process opens the store, plans an epoch, makes the
micro-batches of the first steps and the batch of a step in the middle (as resuming does), and reports its peak memory.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import tempfile
from pathlib import Path

from bench.token_store import WINDOWS_PER_STEP, measure
from common.errors import UserError, run_script
from data.files import check_files
from data.token_build import build_store
from data.tokens import load_tokenizer


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILES", help="text files of a few MB or more in total")
    parser.add_argument("--model", required=True, help="model directory or hub id whose tokenizer is used")
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[10, 1000], help="sizes in MB of text (default: 10 1000)"
    )
    parser.add_argument(
        "--steps", type=int, default=100, help=f"steps of {WINDOWS_PER_STEP} windows to read (default: 100)"
    )
    arguments = parser.parse_args()
    if min(arguments.megabytes) < 1 or arguments.steps < 1:
        raise UserError("--megabytes and --steps must be 1 or more")
    return arguments


def main() -> None:
    """Build the stores, and print one line per size."""
    arguments = parse_arguments()
    check_files(arguments.files)
    with tempfile.TemporaryDirectory(prefix="stores-") as folder:
        store = Path(folder) / "store"
        built = build_store(arguments.files, load_tokenizer(arguments.model), store)
        size = sum(path.stat().st_size for path in arguments.files) / 1e6
        for megabytes in arguments.megabytes:
            copies = max(1, round(megabytes / size))
            found = measure(store, copies, Path(folder) / str(megabytes), arguments.model, arguments.steps)
            print(
                f"{copies * size:6.0f} MB of text, {found['tokens']:,} tokens in {copies * len(built['shards'])} shards: peak "
                f"memory {found['peak'] / 2**20:.0f} MiB ({found['before'] / 2**20:.0f} before opening the store); first "
                f"batch after {found['first_batch_s']:.3f} s, batch of step {found['steps'] // 2} after "
                f"{found['middle_batch_s']:.3f} s; {found['tokens_read']:,} tokens read at {found['tokens_per_s']:,.0f} "
                "tokens/s"
            )


if __name__ == "__main__":
    run_script(main)
