"""Check data and model in a single process, and compute the reference of step 1, as a child of scripts/check.py.

    python scripts/check/step.py --out DIRECTORY --train TRAIN.py CONFIG [section.key=value ...]

It runs as a process of its own, which frees all device memory when it ends. It writes the lines of the report and the reference
to DIRECTORY.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import common  # noqa: F401, I001  first: it silences warnings of the libraries that transformers imports

import argparse
import dataclasses
import functools

import torch
from transformers.utils import logging as transformers_logging

from common.durable_files import write_json
from common.errors import run_script
from configs.load import override, read_command_line
from distributed.device import choose_device
from distributed.host_memory import keep_freed_memory
from model.architectures import has_experts
from model.language_model import PackedLanguageModel, load_for_evaluation
from scripts.check.data import RunInputs, read_run
from scripts.check.reference import REFERENCE, compute_reference
from training.check_result import SKIPPED, Result
from training.quick_check import EPS, ROUNDINGS, check_ends, check_isolation
from training.checkpoint_export import packed_logits

EDITED = (300, 17, 512, 130)  # tokens of the documents of a row that are edited in turn
LINES = "lines.json"  # in the directory of the results


def main() -> int:
    """Check data and model, and write the results. Return 0 whatever they are. Raise UserError for a bad config."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--train", type=Path, required=True)
    options, rest = parser.parse_known_args()
    sys.argv = [sys.argv[0], *rest]
    keep_freed_memory()
    transformers_logging.disable_progress_bar()
    config, _ = read_command_line(__doc__, options.world_size, lambda text: None)
    config = override(config, ["lora.dropout=0.0"])  # as in the runs of the check
    check(read_run(config, options.world_size, choose_device(0, 1), options.train), options.out)
    return 0


def check(run: RunInputs, out: Path) -> None:
    """Do all checks. Write the lines after each, so that a process that dies leaves the earlier ones."""
    lines = list[Result]()
    out.mkdir(exist_ok=True)

    def add(result: Result, **names: str) -> None:
        lines.append(dataclasses.replace(result, **names))
        write_json(out / LINES, [vars(line) for line in lines])

    add(check_ends(run.config, run.tokenizer, run.inputs), group="data", name="EOS")
    try:
        add(isolation(run, load_packed(run)), group="model", name="isolation")
        compute_reference(run).save(out / REFERENCE)
    except (torch.OutOfMemoryError, MemoryError):
        text = "one device does not hold transformers' model and its gradient in fp32: use --layers 2"
        add(Result(SKIPPED, text), group="model", name="reference")


def load_packed(run: RunInputs) -> PackedLanguageModel:
    """Load our own model, unsharded, in the compute dtype of the run."""
    return load_for_evaluation(run.model_config, run.config.model.path, run.compute_dtype, run.device)


def isolation(run: RunInputs, packed: PackedLanguageModel) -> Result:
    """Check that packed documents of the run's unsharded model do not see each other."""
    rounding = ROUNDINGS * EPS[run.compute_dtype] if has_experts(run.model_config) else 0.0
    logits_of = functools.partial(packed_logits, packed)
    return check_isolation(logits_of, run.model_config.vocab_size, run.compute_dtype, run.device.type, rounding, EDITED)


if __name__ == "__main__":
    run_script(main)
