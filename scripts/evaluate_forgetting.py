"""Measure how much general language a tuned model has forgotten: perplexity per byte, KL, agreement, general questions.

    python scripts/evaluate_forgetting.py artifacts/models/SmolLM2-135M-Instruct runs/quickstart/export
    torchrun --nproc_per_node=2 scripts/evaluate_forgetting.py BASE TUNED --texts news.jsonl --json forgetting.json

Every process reads its share of the texts. Several processes share large models, as in training: each holds a part of
them (--sharding). Without --texts, the text is the held-out part of Python's language reference, which this project's
replay and Fisher diagonal never use. Intervals are 95% bootstrap intervals over texts or questions. The tuned model may
have an extended or a different vocabulary; eval/compare_models.py defines what is compared in that case.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.dtypes import add_dtype_option
from common.durable_files import write_json
from common.errors import run_script
from data.tokens import load_tokenizer
from distributed.process_group import StopSignal, read_on_first, start_process_group
from eval.compare_models import ModelAndTokenizer, compare_models, table
from eval.general_text import SOURCE, evaluation_texts
from eval.load_over_ranks import add_sharding_option, agreed_dtype, is_sharded, load_packed
from eval.over_ranks import TIMEOUT_MINUTES
from eval.questions import Question, read_questions
from eval.results import prepare_output
from model.architectures import read_model_config
from model.fingerprint import fingerprint_of_base


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the model before training: a Hugging Face directory")
    parser.add_argument("tuned", help="the model after training")
    parser.add_argument(
        "--texts", nargs="+", type=Path, help="other general text: .txt, or .jsonl or .parquet with `text`"
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=200_000,
        help="approximate amount of text to read, in pieces spread evenly over all of it (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (%(default)s)")
    add_dtype_option(parser)
    add_sharding_option(parser)
    parser.add_argument("--json", type=Path, help="write the metrics to this file")
    return parser.parse_args()


def read_inputs(
    arguments: argparse.Namespace,
) -> tuple[list[str], list[PretrainedConfig], list[PreTrainedTokenizerBase], list[Question]]:
    """Texts, both models' configs and tokenizers, questions. Raises UserError. Called on rank 0 alone."""
    texts = evaluation_texts(arguments.texts, arguments.max_bytes)
    paths = (arguments.base, arguments.tuned)
    configs = [read_model_config(path) for path in paths]
    tokenizers = [load_tokenizer(path) for path in paths]
    if arguments.json:
        prepare_output(arguments.json)
    return texts, configs, tokenizers, read_questions()


def main() -> int:
    """Measure; on rank 0 print the table and write the JSON."""
    arguments = parse_arguments()
    start = time.perf_counter()
    ranks = start_process_group(TIMEOUT_MINUTES)
    stop = StopSignal(ranks)
    texts, configs, tokenizers, questions = read_on_first(lambda: read_inputs(arguments), ranks)
    dtype = agreed_dtype(arguments.dtype, ranks)
    sharded = is_sharded(arguments.sharding, (arguments.base, arguments.tuned), ranks)
    base, tuned = (
        ModelAndTokenizer(load_packed(config, path, dtype, sharded, ranks), tokenizer)
        for config, path, tokenizer in zip(configs, (arguments.base, arguments.tuned), tokenizers, strict=True)
    )
    metrics = compare_models(base, tuned, texts, questions, stop, arguments.seed)
    if ranks.rank == 0:
        seconds = round(time.perf_counter() - start, 1)
        text_source = ", ".join(map(str, arguments.texts)) if arguments.texts else SOURCE
        dtype_used = "bf16" if dtype == torch.bfloat16 else "fp32"
        result = {
            "base": arguments.base,
            "tuned": arguments.tuned,
            "weights": {"base": fingerprint_of_base(arguments.base), "tuned": fingerprint_of_base(arguments.tuned)},
            "text": text_source,
            "dtype": dtype_used,
            "processes": ranks.world_size,
            "sharding": "full" if sharded else "none",
            "seconds": seconds,
            **metrics,
        }
        print(f"{arguments.tuned} against {arguments.base} on {text_source} ({dtype_used}, {seconds:.0f} s)\n")
        print(table(result))
        if arguments.json:
            write_json(arguments.json, result)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_script(main)
