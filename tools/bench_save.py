"""What SHA-256 costs a save: seconds and CPU seconds of saves of the same tensors with and without it, in turns.

    python -m tools.bench_save --mib 1024 --rounds 4 --folder /disk/of/the/run

One rank, tensors of 32 MiB, and a checkpoint as train.py writes it, fsync included. `without` puts a hash that does nothing
in the place of SHA-256. The median of each arm is at the end. Choose a disk like that of the run, and an idle machine.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch

from distributed.checkpoint import Saver
from distributed.process_group import Ranks, process_group

TENSOR = 2**23  # elements of 4 bytes


class _NoHash:
    """In the place of SHA-256."""

    def __init__(self, data: bytes = b"") -> None:
        pass

    def update(self, data: bytes) -> None:
        """Nothing."""

    def hexdigest(self) -> str:
        """As many digits."""
        return "0" * 64


def seconds_of_save(folder: Path, parameters: dict[str, torch.nn.Parameter], ranks: Ranks) -> tuple[float, float]:
    """(seconds, CPU seconds of all threads) of one save of the parameters."""
    saver = Saver(folder, parameters, torch.optim.SGD(parameters.values(), lr=1.0), ranks)
    begin, cpu = time.perf_counter(), time.process_time()
    saver.save({"step": 1})
    return time.perf_counter() - begin, time.process_time() - cpu


def measure(folder: Path, mib: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """The seconds of every save, `with` and `without`. Prints a line for each. The first, which warms up, does not count."""
    found: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    elements = mib * 2**20 // 4
    sizes = [min(TENSOR, elements - start) for start in range(0, elements, TENSOR)]
    parameters = {f"{number}": torch.nn.Parameter(torch.randn(size)) for number, size in enumerate(sizes)}
    with process_group(device=torch.device("cpu")) as ranks:
        for number in range(1 + 2 * rounds):
            arm = "with" if number % 2 else "without"
            with tempfile.TemporaryDirectory(dir=folder) as place:
                if arm == "with":
                    times = seconds_of_save(Path(place), parameters, ranks)
                else:
                    with mock.patch.object(hashlib, "sha256", _NoHash):
                        times = seconds_of_save(Path(place), parameters, ranks)
            if number:
                found[arm].append(times)
                print(f"{arm:8} {times[0]:7.3f} s {times[1]:7.3f} s of CPU", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the tensors (default: 1024)")
    parser.add_argument("--rounds", type=int, default=4, help="saves of each arm (default: 4)")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to save (default: here)")
    arguments = parser.parse_args(argv)
    found = measure(arguments.folder, arguments.mib, arguments.rounds)
    medians = {arm: [statistics.median(each) for each in zip(*times, strict=True)] for arm, times in found.items()}
    (wall, cpu), (plain, plain_cpu) = medians["with"], medians["without"]
    print(
        f"{arguments.mib} MiB, median of {arguments.rounds}: {wall:.3f} s with SHA-256 ({cpu:.3f} s of CPU), {plain:.3f} s "
        f"without ({plain_cpu:.3f}): {wall / plain:.2f} times"
    )


if __name__ == "__main__":
    main()
