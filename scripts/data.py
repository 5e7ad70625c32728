"""Look at the data of a config, build token stores, make general text for replay, and empty caches."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from common.command_line import add_number, check_new, main_of, reader_may_leave
from common.errors import run_script


def show(parser: argparse.ArgumentParser) -> None:
    """Show the data of a config as the model gets it: targets of the loss, tokens that are cut off, and lengths.

        python scripts/data.py show configs/quickstart.py
        python scripts/data.py show configs/quickstart.py --index 3
        python scripts/data.py show configs/quickstart.py --random 5 data.sequence_length=512

    Without --index and --random it prints a summary of all training data and one random example. The model's weights are
    not needed. Colour is used on a terminal unless NO_COLOR is set.
    """
    from training.show_data import MAIN, MAX_TOKENS, show_data

    parser.add_argument("config", help="a config file, e.g. configs/quickstart.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings, as for train.py")
    which = parser.add_mutually_exclusive_group()
    add_number(which, "--index", "show example N of the source; the first is 0", least=0, metavar="N")
    add_number(which, "--random", "show K random examples", least=1, metavar="K")
    parser.add_argument("--source", default=MAIN, help="a source of data.mix instead of data.train")
    parser.add_argument("--full", action="store_true", help=f"show all tokens, not only {MAX_TOKENS} of a sequence")
    arguments = parser.parse_intermixed_args()
    with reader_may_leave():
        show_data(**vars(arguments))


def build(parser: argparse.ArgumentParser) -> None:
    """Tokenise texts into a token store, from which training reads with constant memory: data.train=("OUT",).

    SOURCES may be files, folders, globs, URLs and hub datasets (ORG/NAME:SPLIT), as in data.train. A .txt file is one document; rows
    of other files need `text` and must not have `weight`. EOS follows every document. After an interruption, run the same command
    again: it continues, and the store has the same bytes as after an uninterrupted build.
    """
    from configs.config import Data
    from data.store import SHARD_TOKENS
    from data.token_store import build_and_describe, verify_store
    from model.architectures import check_not_a_run

    parser.add_argument("sources", nargs="*", metavar="SOURCES", help="texts, stored in this order")
    parser.add_argument("--model", help="model directory or hub id whose tokenizer is used")
    parser.add_argument("--out", type=Path, help="directory of the store")
    parser.add_argument("--cache", default=Data.cache, help=f"directory for fetched files ({Data.cache})")
    add_number(parser, "--max-samples", "read only this many rows from the start", least=1)
    add_number(parser, "--shard-tokens", "a shard ends with the document that reaches this number", SHARD_TOKENS, 1)
    parser.add_argument("--verify", type=Path, metavar="OUT", help="check every byte of this store; build nothing")
    arguments = parser.parse_args()
    sources, model, out = arguments.sources, arguments.model, arguments.out
    if arguments.verify:
        store = verify_store(arguments.verify)
        print(f"{arguments.verify}: {store.num_tokens:,} tokens of {store.num_documents:,} documents, all as written")
    elif sources and model and out:
        check_not_a_run(model, "--model")
        print(build_and_describe(sources, model, out, arguments.shard_tokens, arguments.cache, arguments.max_samples))
    else:
        parser.error("SOURCES, --model and --out are required")


def replay(parser: argparse.ArgumentParser) -> None:
    """Make general text to mix into training on a domain (replay), so that the model does not forget it.

        python scripts/data.py replay --source topics --out artifacts/replay/topics.jsonl
        torchrun --nproc_per_node=8 scripts/data.py replay --source model --model DIR --out artifacts/replay/NAME.jsonl

    `topics` is Python's language reference, without the part that evaluation holds out. `model` is text that the model writes
    itself, for models whose training data is not available (eval/sample_replay.py). Documents that are too short, repeat
    themselves, resemble an earlier one or overlap with evaluation texts are dropped and counted. The file does not depend on
    the number of processes. After an interruption, run the same command again: it continues. OUT appears only when complete.
    """
    from eval.load_over_ranks import add_sharding_option
    from eval.sample_replay import SamplingOptions, write_samples, write_topics
    from model.dtypes import add_dtype_option

    parser.add_argument("--source", choices=("topics", "model"), required=True, help="where the text comes from")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument(
        "--exclude",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="your own evaluation texts; documents that overlap with them are dropped",
    )
    parser.add_argument("--model", help="the base model: a Hugging Face directory")
    parser.add_argument("--form", choices=("auto", "text", "chat"), default="auto", help="auto: by the chat template")
    parser.add_argument("--start", help="text before the first sampled token (default: BOS, else EOS)")
    add_number(parser, "--documents", "documents to sample before filtering", SamplingOptions.documents, least=1)
    add_number(parser, "--max-tokens", "longest text, question or answer", SamplingOptions.max_tokens, least=1)
    add_number(parser, "--temperature", "1 is the model's own distribution", SamplingOptions.temperature)
    add_number(parser, "--top-p", "nucleus sampling", SamplingOptions.top_p)
    add_number(parser, "--seed", "seed of the sampling", SamplingOptions.seed)
    add_number(parser, "--batch-size", "documents generated at once", SamplingOptions.batch_size, least=1)
    add_number(parser, "--min-characters", "drop shorter documents", 100)
    add_dtype_option(parser)
    add_sharding_option(parser)
    arguments = vars(parser.parse_args())
    source, out, exclude, sharding = (arguments.pop(name) for name in ("source", "out", "exclude", "sharding"))
    least = arguments.pop("min_characters")
    check_new(out)
    if source == "topics":
        print(write_topics(out, exclude))
    elif report := write_samples(SamplingOptions(**arguments), least, out, exclude, sharding):
        print(report)


def clean(parser: argparse.ArgumentParser) -> None:
    """List the tokenised examples, fetched files (data.cache) and token stores below a directory. With --yes, delete them.

    The next run fetches and tokenises its examples again; a token store must be built again. Tokenised examples in use by a run
    are kept. Fetched files and token stores are deleted in any case, so no run may be using them.
    """

    from data.cache import clean_tokens

    parser.add_argument("directory", type=Path, help="e.g. artifacts/tokens")
    parser.add_argument("--yes", action="store_true", help="delete them")
    arguments = parser.parse_args()
    print(clean_tokens(arguments.directory, arguments.yes))


if __name__ == "__main__":
    run_script(main_of(__doc__, show, build, replay, clean))
