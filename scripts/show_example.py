"""Show what the model gets of the data of a config: which tokens carry loss, what is cut, and how long everything is.

    python scripts/show_example.py configs/quickstart.py
    python scripts/show_example.py configs/quickstart.py --index 3
    python scripts/show_example.py configs/quickstart.py --random 5 data.sequence_length=512

Without --index and --random it prints a summary of all training data and one random example. Settings may follow, as for
train.py. Only the tokenizer and the config.json of model.path are needed, not its weights. Colour is used on a terminal
unless NO_COLOR is set.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import os
import random
from pathlib import Path

from common.errors import UserError, run_script
from configs.loading.config_file import load_config
from data.dealing import one_per_token
from data.show import MAX_TOKENS, Style
from data.sources import MAIN
from data.tokens import load_tokenizer
from model.architectures import read_model_config
from training.chat_settings import settle_chat_settings
from training.inputs import read_inputs
from training.micro_batch import with_rows
from training.show_data import Examples, is_store, summary


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, e.g. configs/quickstart.py")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the config file"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, metavar="N", help="show example N of the source; the first is 0")
    which.add_argument("--random", type=int, metavar="K", help="show K random examples")
    parser.add_argument("--source", default=MAIN, help="a source of data.mix instead of data.train")
    parser.add_argument("--full", action="store_true", help=f"show all tokens, not only {MAX_TOKENS} of a sequence")
    return parser.parse_intermixed_args()


def main() -> int:
    """Print the summary and the examples."""
    arguments = parse_arguments()
    try:
        show(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process
    return 0


def show(arguments: argparse.Namespace) -> None:
    """Read the data and print. Raises UserError for a mistake in the config, its files or the arguments."""
    if arguments.index is not None and arguments.index < 0:
        raise UserError(f"--index must be 0 or more, not {arguments.index}")
    if arguments.random is not None and arguments.random < 1:
        raise UserError(f"--random must be 1 or more, not {arguments.random}")
    config = load_config(arguments.config, arguments.overrides)
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    config = settle_chat_settings(config, tokenizer, Path(config.run.directory, config.run.name), world_size=1)
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    if arguments.index is None and arguments.random is None:
        model_config = read_model_config(config.model.path)
        inputs = read_inputs(
            with_rows(config, 1), tokenizer, model_config.vocab_size, one_per_token, 1, show_progress=True
        )
        print("\n".join(summary(config, inputs)), flush=True)
        if arguments.source == MAIN and any(map(is_store, config.data.train)):
            print("a token store keeps no examples to show", flush=True)
            return
    examples = Examples(config.data, arguments.source)
    chosen = (
        examples.find(arguments.index)
        if arguments.index is not None
        else examples.choose(arguments.random or 1, random.Random())  # the index is printed, for --index
    )
    style = Style(sys.stdout.isatty() and not os.environ.get("NO_COLOR"), None if arguments.full else MAX_TOKENS)
    print(style.legend())
    print("\n".join(examples.show(chosen, config, tokenizer, style)))


if __name__ == "__main__":
    run_script(main)
