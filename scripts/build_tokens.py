"""Tokenise text files into a token store, from which training reads with constant memory: data.train=("OUT",) in a config.

FILES are .txt (one document each), or .jsonl or .parquet with `text`; each may be compressed (.gz, .zst). Every document is
followed by EOS. After an interruption at any moment, the same command resumes after the last complete shard, and the final
bytes are those of an uninterrupted build. `--verify OUT` reads a whole store and checks every byte. `--benchmark` compares the speed with that of the `tokenizers` library alone on
the same texts and cores.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
from pathlib import Path

from tqdm import tqdm

from bench.tokenization import compare_with_tokenizers
from common.errors import UserError, run_script
from data.files import check_files
from data.token_build import SHARD_TOKENS, build_store
from data.token_store import verify_store
from data.tokens import load_tokenizer
from model.architectures import check_not_a_run


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILES", help="text files, stored in this order")
    parser.add_argument("--model", help="model directory or hub id whose tokenizer is used")
    parser.add_argument("--out", type=Path, help="directory of the store")
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        help="a shard ends with the document that reaches this number of tokens (%(default)s)",
    )
    parser.add_argument("--benchmark", action="store_true", help="measure the speed on the first 32 MB; build nothing")
    parser.add_argument("--verify", type=Path, metavar="OUT", help="check every byte of this store; build nothing")
    arguments = parser.parse_args()
    if arguments.verify is not None:
        return arguments
    if not arguments.files or arguments.model is None:
        parser.error("FILES and --model are required")
    if arguments.out is None and not arguments.benchmark:
        parser.error("--out is required")
    if arguments.shard_tokens < 1:
        raise UserError(f"--shard-tokens must be 1 or more, not {arguments.shard_tokens}")
    check_files(arguments.files)
    return arguments


def main() -> None:
    """Build or verify the store, or run the benchmark, and print a summary."""
    arguments = parse_arguments()
    if arguments.verify is not None:
        found = verify_store(arguments.verify)
        print(f"{arguments.verify}: {found.num_tokens:,} tokens of {found.num_documents:,} documents, all as written")
        return
    check_not_a_run(arguments.model, "--model")
    tokenizer = load_tokenizer(arguments.model)
    if arguments.benchmark:
        print(compare_with_tokenizers(arguments.files, tokenizer))
        return
    size = sum(path.stat().st_size for path in arguments.files)
    with tqdm(desc="tokenise", total=size, unit="B", unit_scale=True, mininterval=0.5) as bar:
        store = build_store(arguments.files, tokenizer, arguments.out, arguments.shard_tokens, bar.update)
    print(
        f"{arguments.out}: {store['tokens']:,} tokens of {store['documents']:,} documents in {len(store['shards'])} shards, "
        f"{'uint16' if store['dtype'] == '<u2' else 'uint32'}, tokenizer {store['tokenizer'][:12]}"
    )


if __name__ == "__main__":
    run_script(main)
