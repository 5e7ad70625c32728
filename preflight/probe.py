"""Data, model and precision of a run, checked by one process without a process group. Writes its results as JSON.

    python -m preflight.probe --out RESULTS.json configs/quickstart.py [section.key=value ...]

`train.py --check` starts it as a child, so that no memory of the device stays taken. The file has `results`, a list of
preflight.result.Result, and `reference`, what transformers alone computes for step 1 (preflight/reference.py). It is written
again after each group of checks: if this process dies, what it found stays.
"""

from common.lean_imports import begin_imports, end_imports

begin_imports()
import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from common.durable_files import write_json
from common.errors import UserError, run_script
from configs.loading.command_line import read_command_line
from distributed.device import choose_device
from distributed.host_memory import keep_freed_memory
from preflight.context import SAMPLE
from preflight.data import check_data
from preflight.layers import note
from preflight.model import check_leak, compare_losses, describe_gradient, load_packed, packed_losses
from preflight.precision import check_precision
from preflight.read import RunInputs, read_run, with_model, without_launcher
from preflight.reference import compute, load_reference, micro_batches_of_documents
from preflight.result import FAILS, OK, SKIPPED, Result
from preflight.shares import write_sample

end_imports()

SECONDS = 40.0  # for transformers' losses and gradient; the documents after that are left out


class Report:
    """The results so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.results = path, list[Result]()
        self.reference: dict[str, object] | None = None

    def add(self, *results: Result) -> None:
        """Add results and write the file."""
        self.results += results
        content = {"results": [dataclasses.asdict(result) for result in self.results], "reference": self.reference}
        write_json(self.path, content)


def main() -> int:
    """Read the options, check, write. Returns 0 whatever is found: the results say it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers-model", help="a directory of preflight/layers.py in place of model.path")
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the run, for the deal of its steps")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the losses and gradient of transformers")
    options, rest = parser.parse_known_args()
    sys.argv = [sys.argv[0], *rest]
    without_launcher()
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    report = Report(options.out)
    try:
        config = read_command_line(__doc__, options.world_size, lambda text: None).config
        if options.layers_model:
            config = with_model(config, options.layers_model)
        run = read_run(config, options.world_size, choose_device(0, 1), lambda text: None)
    except UserError as error:
        report.add(Result("data", "inputs", FAILS, str(error)))
        return 0
    check(run, report, options.seconds)
    return 0


def check(run: RunInputs, report: Report, seconds: float) -> None:
    """All checks, in the order of what they cost."""
    _guarded(report, "data", lambda: report.add(*check_data(run)))
    if cut := note(run.config.model.path):
        report.add(Result("model", "layers", OK, cut))
    losses, documents = [], []

    def own_model() -> None:
        packed = load_packed(run)
        report.add(check_leak(run, packed))
        found, sums = packed_losses(run, packed)
        documents.extend(found)
        losses.extend(sums)

    def references() -> None:
        reference = load_reference(run, documents)
        if reference is not None:
            compute(reference, seconds)
            report.reference = reference.as_json()
            if reference.sample and reference.complete:
                write_sample(report.path.with_name(SAMPLE), reference.sample, micro_batches_of_documents(run))
            report.add(compare_losses(run, losses, reference), describe_gradient(reference))
        else:
            report.add(Result("model", "loss", SKIPPED, "transformers' model does not fit into memory: use --layers 2"))
        report.add(*check_precision(run, reference))

    _guarded(report, "model", own_model)
    _free()
    if documents:
        _guarded(report, "model", references)


def _guarded(report: Report, group: str, do: Callable[[], None]) -> None:
    """Run some checks; too little memory leaves them out with a line, and a UserError fails with its sentence."""
    started = time.perf_counter()
    try:
        do()
    except UserError as error:
        report.add(Result(group, "inputs", FAILS, str(error)))
    except (torch.OutOfMemoryError, MemoryError):
        _free()
        text = "memory holds no more checks of the model on one device: use --layers 2"
        report.add(Result(group, "memory", SKIPPED, text))
    print(f"{group} checked in {time.perf_counter() - started:.1f} s, going on", file=sys.stderr, flush=True)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_script(main)
