"""Extend a model's vocabulary with tokens for its domain, in a new model directory that train.py takes as model.path.

    python scripts/extend_vocabulary.py artifacts/models/SmolLM2-135M-Instruct --out artifacts/models/SmolLM2-135M-bank \\
        --corpus artifacts/xbrl/train.jsonl --forms --held-out artifacts/xbrl/test_banks.jsonl package.txt

Corpus and held-out files are .jsonl or .parquet (chats, or `text`) or .txt, optionally compressed (.gz). The script prints
tokens per document before and after, on the held-out files and on general text (a held-out part of Python's
documentation); the tokens that save most; and, for each method to initialise their rows, the loss per byte before any
training. OUT is created only when it is complete. OUT/new_tokens.json lists the new tokens.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
from pathlib import Path

from tqdm import tqdm

from common.durable_files import new_directory
from common.errors import UserError, run_script
from data.regulator.dpm import DISTILLED, load_cells
from data.regulator.forms import form_texts
from eval import general_text
from eval.vocabulary import TokenCount, count_tokens, initial_losses, read_texts, select_passages
from model.architectures import read_model_config
from model.vocabulary.candidates import PATTERNS, NewToken, expand_patterns, find_new_tokens
from model.vocabulary.extension import write_extension
from model.vocabulary.rows import METHODS, NOISE, Initialisation
from model.vocabulary.tokenizer import BaseTokenizer, can_be_token, read_base_tokenizer, sub_tokens

NUM_SHOWN = 20  # new tokens to print


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help. Raises UserError for values that do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory (config, safetensors, tokenizer)")
    parser.add_argument("--out", type=Path, required=True, help="the directory to create")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="files in which new tokens are searched")
    parser.add_argument(
        "--forms",
        nargs="*",
        metavar="MODULE",
        help="also search the EBA's forms (needs scripts/fetch_dpm.py): all, or those of COREP_LCR_DA ...",
    )
    parser.add_argument(
        "--patterns",
        nargs="*",
        default=["regulator"],
        help=f"what becomes one token as a whole: regular expressions, or {', '.join(PATTERNS)} (%(default)s)",
    )
    parser.add_argument("--new-tokens", type=int, default=2000, help="maximum number of new tokens (%(default)s)")
    parser.add_argument(
        "--min-count", type=int, default=20, help="minimum occurrences of a new token in the corpus (%(default)s)"
    )
    parser.add_argument("--init", choices=METHODS, default="subtokens", help="initialisation of new rows (%(default)s)")
    parser.add_argument(
        "--noise", type=float, default=NOISE, help="noise in standard deviations of the old rows (%(default)s)"
    )
    parser.add_argument(
        "--multiple", type=int, default=64, help="training pads the vocabulary to a multiple of this (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    parser.add_argument(
        "--held-out", type=Path, nargs="+", default=[], help="files outside the corpus, to measure the effect on"
    )
    parser.add_argument(
        "--loss-bytes",
        type=int,
        default=40_000,
        help="bytes of each kind of text to measure the loss on; 0: do not measure it (%(default)s)",
    )
    arguments = parser.parse_args()
    for name in ("new_tokens", "min_count", "multiple"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(arguments, name)}")
    if arguments.noise < 0 or arguments.loss_bytes < 0:
        raise UserError("--noise and --loss-bytes must not be negative")
    if not arguments.corpus and arguments.forms is None:
        raise UserError("there is no text to search for new tokens; give --corpus FILE or --forms")
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists; remove it or choose another --out")
    if arguments.forms is not None and not DISTILLED.is_file():
        raise UserError("--forms needs the EBA's Data Point Model; run scripts/fetch_dpm.py")
    return arguments


def find_tokens(arguments: argparse.Namespace, base: BaseTokenizer) -> list[NewToken]:
    """Search the corpus and the forms for new tokens. Raises UserError if there are none."""
    corpus = [text for path in tqdm(arguments.corpus, desc="corpus", leave=False) for text in read_texts(path)]
    if arguments.forms is not None:
        corpus += form_texts(load_cells(DISTILLED), tuple(arguments.forms))
    print(f"looking for new tokens in {len(corpus):,} texts, {sum(map(len, corpus)):,} characters ...", flush=True)
    found = find_new_tokens(
        corpus,
        lambda text: len(sub_tokens(base, text)),
        arguments.new_tokens,
        expand_patterns(arguments.patterns),
        arguments.min_count,
        general_text.training_texts(),
        lambda text: can_be_token(base, text),
    )
    if not found:
        raise UserError("no string of the corpus is worth a token; give more text or lower --min-count")
    if len(found) < arguments.new_tokens:
        print(
            f"fewer than --new-tokens {arguments.new_tokens}: every other string occurs in the corpus less than --min-count "
            f"{arguments.min_count} times, or saves nothing"
        )
    return found


def main() -> int:
    """Find the tokens, write the model, measure and print the effect."""
    arguments = parse_arguments()
    config = read_model_config(str(arguments.model))
    base = read_base_tokenizer(arguments.model)
    texts = {str(path): read_texts(path) for path in arguments.held_out}
    texts["general text"] = general_text.held_out_texts()
    found = find_tokens(arguments, base)
    init = Initialisation(arguments.init, arguments.noise, arguments.seed)
    last_id = base.size + len(found) - 1
    with new_directory(arguments.out) as directory:
        extended = write_extension(arguments.model, directory, config, base, found, init, arguments.multiple)
        print(f"{len(found)} new tokens, ids {base.size} to {last_id}; the model had {config.vocab_size} rows")
        print(token_table({kind: count_tokens(part, base.backend, extended) for kind, part in texts.items()}))
        print(best_table(found))
        if arguments.loss_bytes:
            passages = {kind: select_passages(part, arguments.loss_bytes) for kind, part in texts.items()}
            spelled = [sub_tokens(base, token.text) for token in found]
            print(loss_table(initial_losses(arguments.model, directory, base.size, spelled, init, passages)))
    print(f"{arguments.out}: rows initialised by {arguments.init}; train with model.path={arguments.out}")
    return 0


def token_table(counts: dict[str, TokenCount]) -> str:
    """Tokens per document for each kind of text."""
    lines = ["", f"{'tokens per document':40} {'before':>9} {'after':>9} {'change':>8} {'documents':>10}"]
    for kind, count in counts.items():
        change = count.after / max(1, count.before) - 1
        before, after = count.before / count.documents, count.after / count.documents
        lines.append(f"{kind[-40:]:40} {before:9.1f} {after:9.1f} {change:+8.2%} {count.documents:10}")
    return "\n".join(lines)


def best_table(found: list[NewToken]) -> str:
    """The tokens that save most in the corpus."""
    lines = ["", f"{'tokens that save most':56} {'count':>8} {'saved':>9}"]
    lines += [f"{token.text!r:56} {token.count:8,} {token.saved:9,}" for token in found[:NUM_SHOWN]]
    return "\n".join(lines)


def loss_table(losses: dict[str, dict[str, float]]) -> str:
    """A row for each initialisation, a column for each kind of text."""
    kinds = list(next(iter(losses.values())))
    lines = ["", f"{'loss per byte at step 0 (nats)':32}" + "".join(f"{Path(kind).name[-24:]:>26}" for kind in kinds)]
    lines += [f"{row:32}" + "".join(f"{values[kind]:26.4f}" for kind in kinds) for row, values in losses.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
