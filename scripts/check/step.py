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

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from model.dtypes import dtype_name
from common.durable_files import write_json
from common.errors import run_script
from configs.load import override, read_command_line
from distributed.device import choose_device
from distributed.host_memory import keep_freed_memory
from model.architectures import has_experts
from model.language_model import PackedLanguageModel, load_for_evaluation
from scripts.check.data import RunInputs, check_ends, read_run
from scripts.check.reference import EPS, REFERENCE, ROUNDINGS, compute_reference
from scripts.check.result import FAILS, OK, SKIPPED, Result
from training.checkpoint_export import packed_logits

EDITED = (300, 17, 512, 130)  # tokens of the documents of a row that are edited in turn
POSITIONS = 256  # of that row, whose logits are compared
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

    add(check_ends(run), group="data", name="EOS")
    try:
        add(check_isolation(run, load_packed(run)), group="model", name="isolation")
        compute_reference(run).save(out / REFERENCE)
    except (torch.OutOfMemoryError, MemoryError):
        text = "one device does not hold transformers' model and its gradient in fp32: use --layers 2"
        add(Result(SKIPPED, text), group="model", name="reference")


def load_packed(run: RunInputs) -> PackedLanguageModel:
    """Load our own model, unsharded, in the compute dtype of the run."""
    return load_for_evaluation(run.model_config, run.config.model.path, run.compute_dtype, run.device)


def check_isolation(run: RunInputs, packed: PackedLanguageModel) -> Result:
    """Check that packed documents do not see each other, and that no token sees later ones.

    Each document of a row of random tokens is edited in turn: the logits of all others must keep their bits. Then the last token
    of every document is edited: no logit before it may move. With experts, logits may move by rounding, because the rounding of a
    product over the tokens of an expert depends on their number.
    """
    vocabulary, lengths, random = run.model_config.vocab_size, np.array(EDITED), np.random.default_rng(0)
    documents = [random.integers(0, vocabulary, length) for length in lengths]
    starts = np.cumsum(lengths) - lengths
    spread = np.linspace(0, lengths.sum() - 1, POSITIONS).astype(int)
    positions = np.unique(np.concatenate([spread, starts, starts + lengths - 1]))
    owner = np.searchsorted(starts, positions, side="right") - 1  # the document of each position
    base = packed_logits(packed, documents, positions)
    if not bool(base.isfinite().all()):
        return Result(FAILS, "logits of random tokens are not finite: see model.path and model.compute_dtype")

    def change(edited: list[np.ndarray]) -> np.ndarray:
        """Return the largest move of a logit at each position. A logit that is not finite moves by infinity."""
        moves = (packed_logits(packed, edited, positions) - base).abs().amax(dim=1).numpy()
        return np.nan_to_num(moves, nan=np.inf, posinf=np.inf)

    moves = np.zeros((len(documents), len(documents)))  # [edited document, document of the logit]
    for edited, document in enumerate(documents):
        replacement = (document + random.integers(1, vocabulary, len(document))) % vocabulary
        np.maximum.at(moves[edited], owner, change([*documents[:edited], replacement, *documents[edited + 1 :]]))
    leaks = np.where(np.eye(len(documents)), 0.0, moves)
    edited, seen = np.unravel_index(leaks.argmax(), leaks.shape)
    ends = [np.append(document[:-1], (document[-1:] + 1) % vocabulary) for document in documents]
    later = float(change(ends)[~np.isin(positions, starts + lengths - 1)].max())
    leak, moved = float(leaks.max()), float(moves.diagonal().min())
    rounding = ROUNDINGS * EPS[run.compute_dtype] * float(base.abs().max()) if has_experts(run.model_config) else 0.0
    advice = (
        "do not train with this attention; check model/packed_attention.py and the versions of torch and transformers"
    )
    if leak > rounding:
        text = (
            f"documents see each other: changing document {edited + 1} of {len(documents)} moves the logits of document "
            f"{seen + 1} by up to {leak:.3g}; {advice}"
        )
        return Result(FAILS, text)
    if later > rounding:
        text = f"a token sees later ones: changing the last token moves logits before it by up to {later:.3g}; {advice}"
        return Result(FAILS, text)
    if not moved:
        return Result(FAILS, "changing a document does not even move its own logits: the model does not read its input")
    text = (
        f"{len(documents)} documents of a row changed in turn: the logits of all others "
        f"{f'move by {rounding:.2g} at most, as experts round' if rounding else 'keep their bits'} "
        f"({dtype_name(run.compute_dtype)}, {run.device.type}); no token sees later ones"
    )
    return Result(OK, text)


if __name__ == "__main__":
    run_script(main)
