"""Mean loss by position in long documents, up to and beyond a model's window, with its own RoPE and with scaled RoPE.

    python scripts/evaluate_positions.py artifacts/models/SmolLM2-135M-Instruct --length 12288 --rope-type yarn --rope-factor 2
    torchrun --nproc_per_node=2 scripts/evaluate_positions.py runs/long/export --data reports.txt.gz more.jsonl --length 12288 --json after.json

The texts of each file are joined to one long text and cut into documents of --length tokens. Without --data, the text
is the part of Python's language reference that other evaluations do not hold out; it is available on every machine.
Several processes share the documents, and a large model too (--sharding).
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from common.dtypes import add_dtype_option
from common.durable_files import write_json
from common.errors import UserError, run_script
from data.tokens import load_tokenizer
from distributed.process_group import StopSignal, read_on_first, start_process_group
from eval.general_text import SOURCE
from eval.load_over_ranks import add_sharding_option, agreed_dtype, is_sharded, load_packed
from eval.over_ranks import TIMEOUT_MINUTES
from eval.positions import buckets, losses_over_ranks, read_long_documents, table
from eval.results import prepare_output
from model.architectures import read_model_config
from model.rope import STRETCHING


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face directory (config, safetensors, tokenizer)")
    parser.add_argument(
        "--data", nargs="+", type=Path, help="long texts: .txt, or .jsonl or .parquet with `text`; also .gz"
    )
    parser.add_argument("--length", type=int, required=True, help="tokens per document; may exceed the window")
    parser.add_argument("--bucket", type=int, default=1024, help="positions per row of the table (%(default)s)")
    parser.add_argument(
        "--documents", type=int, default=2, help="maximum number of documents, spread over the text (%(default)s)"
    )
    parser.add_argument(
        "--rope-type", nargs="+", default=[], choices=tuple(STRETCHING), help="also measure with this RoPE scaling"
    )
    parser.add_argument("--rope-factor", type=float, help="the factor by which the window is extended")
    parser.add_argument(
        "--rope-original-length", type=int, help="the window before scaling (default: from the model's config.json)"
    )
    add_dtype_option(parser)
    add_sharding_option(parser)
    parser.add_argument("--json", type=Path, help="write the losses to this file")
    arguments = parser.parse_args()
    for name in ("bucket", "documents"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be 1 or more, not {getattr(arguments, name)}")
    if arguments.length < 2:
        raise UserError(f"--length must be 2 or more, not {arguments.length}")
    if (arguments.rope_factor, arguments.rope_original_length) != (None, None) and not arguments.rope_type:
        raise UserError("--rope-factor and --rope-original-length need a --rope-type")
    return arguments


def read_inputs(arguments: argparse.Namespace) -> tuple[dict[str, PretrainedConfig], list[list[int]]]:
    """(the model's config for each column of the table, the documents). Raises UserError. Called on rank 0 alone."""
    if arguments.json:
        prepare_output(arguments.json)
    scaling = (arguments.rope_factor, arguments.rope_original_length)
    configs = {"as it is": read_model_config(arguments.model)}
    for rope_type in arguments.rope_type:
        config = read_model_config(arguments.model, rope_type, *scaling)
        configs[f"{rope_type} x{arguments.rope_factor:g}"] = config
    tokenizer = load_tokenizer(arguments.model)
    return configs, read_long_documents(arguments.data, tokenizer, arguments.length, arguments.documents)


def main() -> int:
    """Measure every column; on rank 0 print the table and write the JSON."""
    arguments = parse_arguments()
    ranks = start_process_group(TIMEOUT_MINUTES)
    stop = StopSignal(ranks)
    configs, documents = read_on_first(lambda: read_inputs(arguments), ranks)
    windows = {name: config.max_position_embeddings for name, config in configs.items()}
    dtype = agreed_dtype(arguments.dtype, ranks)
    sharded = is_sharded(arguments.sharding, [arguments.model], ranks)
    columns = {}
    for name, config in configs.items():
        model = load_packed(config, arguments.model, dtype, sharded, ranks)
        columns[name] = buckets(losses_over_ranks(model, documents, stop, name), arguments.bucket)
        del model  # before the next one is loaded
    dist.destroy_process_group()
    if ranks.rank != 0:
        return 0

    source = ", ".join(map(str, arguments.data)) if arguments.data else SOURCE
    dtype_used = "bf16" if dtype == torch.bfloat16 else "fp32"
    print(f"{arguments.model} on {len(documents)} documents of {arguments.length} tokens from {source} ({dtype_used})")
    print(f"windows: {', '.join(f'{name} {window}' for name, window in windows.items())}")
    print(table(columns))
    if arguments.json:
        result = {"model": arguments.model, "source": source, "length": arguments.length, "documents": len(documents)}
        result |= {"dtype": dtype_used, "windows": windows}
        result["buckets"] = {name: [vars(b) | {"mean": b.mean} for b in column] for name, column in columns.items()}
        write_json(arguments.json, result)
    return 0


if __name__ == "__main__":
    run_script(main)
