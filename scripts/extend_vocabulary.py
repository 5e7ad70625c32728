"""Extend a model's vocabulary with tokens for its domain, in a new model directory that train.py takes as model.path.

    python scripts/extend_vocabulary.py artifacts/models/SmolLM2-135M-Instruct --out artifacts/models/SmolLM2-135M-extended \\
        --corpus mine.jsonl --held-out held_out.jsonl

Corpus and held-out files are .jsonl or .parquet (chats, or `text`) or .txt, optionally compressed (.gz). The script prints
tokens per document before and after, on the held-out files and on general text (a held-out part of Python's documentation),
and the tokens that save most. No token crosses the end of a sentence or of a line, or a figure. OUT is created only when it is
complete. OUT/new_tokens.json lists the new tokens. --task MODULE names a task (eval/task.py) that may have patterns, and texts
for --forms.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizers import Tokenizer

from common.command_line import add_number, check_new, new_parser
from common.durable_files import new_directory
from common.errors import UserError, run_script
from data.formats import example_text, read_files
from eval import general_text
from eval.task import add_task_option
from model.architectures import read_model_config
from model.new_tokens import check_patterns, find_new_tokens
from model.text_part import is_part
from model.vocabulary import can_be_token, first_new_id, read_base_tokenizer, sub_tokens, write_extension

NUM_SHOWN = 20  # tokens in the table of those that save most


def read_texts(paths: list[Path]) -> list[str]:
    """Return the texts of files; the messages of a chat are joined to one text."""
    return [example_text(example) for _, example in read_files(paths)]


def print_lengths(texts: dict[str, list[str]], before: Tokenizer, after: Tokenizer) -> None:
    """Print tokens per document with two tokenizers, without special tokens. texts: kind of text -> documents."""
    print(f"\n{'tokens per document':40} {'before':>9} {'after':>9} {'change':>8} {'documents':>10}")
    for kind, documents in texts.items():
        old, new = (sum(len(sub_tokens(tokenizer, text)) for text in documents) for tokenizer in (before, after))
        means = f"{old / len(documents):9.1f} {new / len(documents):9.1f}"
        print(f"{kind[-40:]:40} {means} {new / max(1, old) - 1:+8.2%} {len(documents):10}")


def main() -> int:
    """Find the tokens, write the model, and print the effect."""
    parser = new_parser(__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face directory (config, safetensors, tokenizer)")
    parser.add_argument("--out", type=Path, required=True, help="the directory to create")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[], help="files in which new tokens are searched")
    forms = "also search the texts of the --task: all, or those of NAME ..."
    parser.add_argument("--forms", nargs="*", metavar="NAME", help=forms)
    patterns = "regular expressions of strings that may become one token (default: none; with --task: its patterns)"
    parser.add_argument("--patterns", nargs="+", metavar="PATTERN", help=patterns)
    add_number(parser, "--new-tokens", "maximum number of new tokens", 2000, least=1)
    add_number(parser, "--min-count", "minimum occurrences of a new token in the corpus", 20, least=1)
    held_out = "files outside the corpus, to measure the effect on"
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], help=held_out)
    task = add_task_option(parser)
    arguments = parser.parse_args()
    check_new(arguments.out)
    if arguments.forms is not None and task.forms is None:
        raise UserError("--forms are texts of a task; name one that has some with --task MODULE")
    if not arguments.corpus and arguments.forms is None:
        raise UserError("there is no text to search for new tokens; give --corpus FILE or --forms")

    patterns = task.patterns if arguments.patterns is None else arguments.patterns
    if patterns == ["none"]:
        patterns = []
    check_patterns(patterns)
    config = read_model_config(str(arguments.model))
    if is_part(config):
        raise UserError(f"{arguments.model} also reads images, and the vocabulary of such a model cannot be extended")
    base = read_base_tokenizer(arguments.model)
    first = first_new_id(base)
    texts = {str(path): read_texts([path]) for path in arguments.held_out}
    texts["general text"] = general_text.held_out_texts()
    corpus = read_texts(arguments.corpus)
    if task.forms and arguments.forms is not None:
        corpus += task.forms(arguments.forms)
    print(f"looking for new tokens in {len(corpus):,} texts, {sum(map(len, corpus)):,} characters ...", flush=True)
    new_tokens = find_new_tokens(
        corpus,
        lambda text: len(sub_tokens(base, text)),
        arguments.new_tokens,
        patterns,
        arguments.min_count,
        general_text.training_texts(),
        lambda text: can_be_token(base, text),
    )
    if not new_tokens:
        raise UserError("no string of the corpus is worth a token; give more text or lower --min-count")
    with new_directory(arguments.out) as directory:
        extended = write_extension(arguments.model, directory, config, base, new_tokens)
    print(f"{len(new_tokens)} new tokens, ids {first} to {first + len(new_tokens) - 1}")
    print_lengths(texts, base, extended)
    print(f"\n{'tokens that save most':56} {'count':>8} {'saved':>9}")
    for token in new_tokens[:NUM_SHOWN]:
        print(f"{token.text!r:56} {token.count:8,} {token.saved:9,}")
    print(f"{arguments.out}: train with model.path={arguments.out}")
    return 0


if __name__ == "__main__":
    run_script(main)
