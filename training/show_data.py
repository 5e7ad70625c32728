"""Show the data of a config as its run would read them: a summary, and single examples."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np

from common.errors import UserError
from configs.config import Data
from configs.load import load_config
from data.dealing import length_as_cost
from data.encoding import ExampleEncoder
from data.files import expand, reading_of
from data.formats import read_files
from data.held_out import group_hash, is_held_out
from data.remote import with_local_files
from data.show import MAX_TOKENS, Style, describe_source, one_line, show_outcome
from data.sources import MAIN
from data.store import is_store
from data.tokens import load_tokenizer
from model.architectures import read_model_config
from training.chat_settings import chat_settings, settle_chat_settings
from training.inputs import Inputs, read_inputs, settle_length
from training.micro_batch import with_rows


def show_data(
    config: str, overrides: Sequence[str], index: int | None, random: int | None, source: str = MAIN, full: bool = False
) -> None:
    """Print a summary of a config's data and one example. With `index` or `random`, print this example or that many instead.

    config, overrides: as on the command line of train.py. source: `main` for data.train, or a name from data.mix.
    full: print all tokens. Raise UserError for a mistake in the config, its files or the other arguments.
    """
    settings = load_config(config, overrides)
    tokenizer = load_tokenizer(settings.model.path, settings.data.chat_template)
    settings = settle_chat_settings(settings, tokenizer, Path(settings.run.directory, settings.run.name))
    model_config = read_model_config(settings.model.path)
    settings = settle_length(settings, model_config, tokenizer, show_progress=True)
    settings = with_local_files(settings, lambda text: print(text, file=sys.stderr))
    if index is None and random is None:
        inputs = read_inputs(
            with_rows(settings, 1), tokenizer, model_config.vocab_size, length_as_cost, 1, show_progress=True
        )
        print("\n".join(summary(inputs)), flush=True)
        if source == MAIN and any(map(is_store, settings.data.train)):
            print("a token store keeps no examples to show", flush=True)
            return
    style = Style(sys.stdout.isatty() and not os.environ.get("NO_COLOR"), None if full else MAX_TOKENS)
    encoder = ExampleEncoder(tokenizer, chat_settings(settings.data))
    data, lines = settings.data, [style.legend()]
    chosen = choose(data, source, random or 1, Random()) if index is None else [find(data, source, index)]
    for number, where, example in chosen:  # the number of a random choice is printed, for --index
        lines += ["", f"=== example {number} of {_in_words(source)} ({one_line(where)})"]
        share = data.validation_share if source == MAIN else 0.0
        if share and is_held_out(group_hash(example, data.split_by), share):
            lines.append(f"HELD OUT for validation (data.validation_share={share:g})")
        (outcome,) = encoder.encode([example])
        lines += show_outcome(outcome, tokenizer, "text" in example, data.length, data.too_long, style)
    print("\n".join(lines))


def summary(inputs: Inputs) -> list[str]:
    """Return lines that describe all training data of a config."""
    lines = []
    for name, source in zip(inputs.train.names, inputs.train.sources, strict=True):
        title = _in_words(name)
        lengths, targets = getattr(source, "lengths", None), getattr(source, "targets", None)
        if lengths is None or targets is None:  # a token store would have to be read as a whole
            lines += [f"{title}:", f"  {source.report}"]
        else:
            lines += describe_source(title, source.report, np.asarray(lengths), np.asarray(targets))
    if inputs.validation:
        lines += inputs.validation.lines("validation")
    return lines


def _in_words(source: str) -> str:
    return "data.train" if source == MAIN else f"source {source}"


def examples_of(data: Data, source: str = MAIN) -> Iterator[tuple[str, dict]]:
    """Yield (file and line, example) for each well-formed example of a source, in file order.

    Raise UserError at the first step if there is no such source, or if it is a token store.
    """
    sources = {MAIN: (data.train, reading_of(data, data.on_bad))}
    sources |= {mixed.name: (mixed.paths, reading_of(mixed, data.on_bad)) for mixed in data.mix}
    if source not in sources:
        raise UserError(f"the config has no source {source}; choose one of {', '.join(sources)}")
    paths, reading = sources[source]
    for path in filter(is_store, paths):
        raise UserError(f"{path} is a token store, which keeps no examples; name the files it was made from")
    yield from read_files(expand(paths), reading)


def find(data: Data, source: str, index: int) -> tuple[int, str, dict]:
    """Return (index, file and line, example) for this index, from 0 over all files. Raise UserError if there is none."""
    count = 0
    for where, example in examples_of(data, source):
        if count == index:
            return index, where, example
        count += 1
    raise UserError(
        f"{_in_words(source)} has {count:,} examples, so --index must be 0 to {count - 1}, not {index}; choose another one"
    )


def choose(data: Data, source: str, number: int, rng: Random) -> list[tuple[int, str, dict]]:
    """Choose `number` examples at random, and return them as `find` does, in file order; all examples if there are fewer."""
    chosen: list[tuple[int, str, dict]] = []
    # Reservoir sampling: every set of examples is equally probable.
    for index, (where, example) in enumerate(examples_of(data, source)):
        place = index if index < number else rng.randrange(index + 1)
        if place < number:
            chosen[place : place + 1] = [(index, where, example)]
    return sorted(chosen, key=lambda item: item[0])
