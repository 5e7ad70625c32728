"""Extend a model's vocabulary with tokens for its domain, in a new model directory that train.py takes as model.path.

    python scripts/extend_vocabulary.py artifacts/models/SmolLM2-135M-Instruct --out artifacts/models/SmolLM2-135M-extended \\
        --corpus mine.jsonl --held-out held_out.jsonl package.txt --patterns "[A-Z]{2}-[0-9]{4}"

Corpus and held-out files are .jsonl or .parquet (chats, or `text`) or .txt, optionally compressed (.gz). The script prints
tokens per document before and after, on the held-out files and on general text (a held-out part of Python's
documentation); the tokens that save most; and, for each method to initialise their rows, the loss per byte before any
training. OUT is created only when it is complete. OUT/new_tokens.json lists the new tokens. --task MODULE names a task
(eval/task.py) that may have patterns, and texts for --forms.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import add_number, check_new, new_parser
from common.durable_files import new_directory
from common.errors import UserError, run_script
from eval import general_text
from eval.task import add_task_option
from eval.vocabulary import best_table, loss_table, read_texts, token_table
from model.architectures import read_model_config
from model.new_tokens import expand_patterns, find_new_tokens
from model.vocabulary import (
    METHODS,
    NOISE,
    Initialisation,
    can_be_token,
    read_base_tokenizer,
    sub_tokens,
    write_extension,
)


def main() -> int:
    """Find the tokens, write the model, measure and print the effect."""
    parser = new_parser(__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face directory (config, safetensors, tokenizer)")
    parser.add_argument("--out", type=Path, required=True, help="the directory to create")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="files in which new tokens are searched")
    forms = "also search the texts of the --task: all, or those of NAME ..."
    parser.add_argument("--forms", nargs="*", metavar="NAME", help=forms)
    patterns = "regular expressions of strings that may become one token (default: those of the --task)"
    parser.add_argument("--patterns", nargs="*", metavar="PATTERN", help=patterns)
    add_number(parser, "--new-tokens", "maximum number of new tokens", 2000, least=1)
    add_number(parser, "--min-count", "minimum occurrences of a new token in the corpus", 20, least=1)
    parser.add_argument("--init", choices=METHODS, default="subtokens", help="initialisation of new rows (%(default)s)")
    add_number(parser, "--noise", "noise in standard deviations of the old rows", NOISE, least=0)
    add_number(parser, "--multiple", "training pads the vocabulary to a multiple of this", 64, least=1)
    add_number(parser, "--seed", "seed of the noise", 0)
    held_out = "files outside the corpus, to measure the effect on"
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], help=held_out)
    loss_bytes = "bytes of each kind of text to measure the loss on; 0: do not measure it"
    add_number(parser, "--loss-bytes", loss_bytes, 40_000, least=0)
    task = add_task_option(parser)
    arguments = parser.parse_args()
    check_new(arguments.out)
    if arguments.forms is not None and task.forms is None:
        raise UserError("--forms are texts of a task; name one that has some with --task MODULE")
    if not arguments.corpus and arguments.forms is None:
        raise UserError("there is no text to search for new tokens; give --corpus FILE or --forms")

    config = read_model_config(str(arguments.model))
    base = read_base_tokenizer(arguments.model)
    texts = {str(path): read_texts(path) for path in arguments.held_out}
    texts["general text"] = general_text.held_out_texts()
    corpus = [text for path in arguments.corpus for text in read_texts(path)]
    if task.forms and arguments.forms is not None:
        corpus += task.forms(arguments.forms)
    patterns = task.patterns if arguments.patterns is None else arguments.patterns
    print(f"looking for new tokens in {len(corpus):,} texts, {sum(map(len, corpus)):,} characters ...", flush=True)
    new_tokens = find_new_tokens(
        corpus,
        lambda text: len(sub_tokens(base, text)),
        arguments.new_tokens,
        expand_patterns([*patterns], {}),
        arguments.min_count,
        general_text.training_texts(),
        lambda text: can_be_token(base, text),
    )
    if not new_tokens:
        raise UserError("no string of the corpus is worth a token; give more text or lower --min-count")
    if len(new_tokens) < arguments.new_tokens:
        rare = f"occurs in the corpus less than --min-count {arguments.min_count} times, or saves nothing"
        print(f"fewer than --new-tokens {arguments.new_tokens}: every other string {rare}")
    init = Initialisation(arguments.init, arguments.noise, arguments.seed)
    with new_directory(arguments.out) as directory:
        extended = write_extension(arguments.model, directory, config, base, new_tokens, init, arguments.multiple)
        ids = f"ids {base.size} to {base.size + len(new_tokens) - 1}"
        print(f"{len(new_tokens)} new tokens, {ids}; the model had {config.vocab_size} rows")
        print(token_table(texts, base.backend, extended))
        print(best_table(new_tokens))
        if arguments.loss_bytes:
            spelled = [sub_tokens(base, token.text) for token in new_tokens]
            print(loss_table(arguments.model, directory, base.size, spelled, init, texts, arguments.loss_bytes))
    print(f"{arguments.out}: rows initialised by {arguments.init}; train with model.path={arguments.out}")
    return 0


if __name__ == "__main__":
    run_script(main)
