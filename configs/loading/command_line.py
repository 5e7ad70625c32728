"""The command line of train.py: a config file, `section.key=value` overrides, and optionally a DeepSpeed JSON file.

The DeepSpeed settings are applied to the config before the overrides.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from configs.config import Config
from configs.loading.config_file import load_config, override
from configs.loading.deepspeed import from_deepspeed


@dataclass(frozen=True)
class Command:
    """What train.py, or a program that starts it, was asked for."""

    config: Config
    arguments: tuple[str, ...]  # that give this config again: the file, the overrides, --deepspeed FILE
    options: argparse.Namespace  # all arguments, with those of `add_options`


def read_command_line(
    description: str | None,
    world_size: int,
    say: Callable[[str], None],
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> Command:
    """Parse sys.argv. `say` gets a line per DeepSpeed setting. add_options: those of another program. Raises UserError."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config file, e.g. configs/quickstart.py")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that replace those of the config file, e.g. batch.global_examples=32",
    )
    parser.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="apply the settings of a DeepSpeed JSON file to the config (docs/runs.md)",
    )
    if add_options:
        add_options(parser)
    else:  # train.py hands these two over before it comes here
        plan = "print the plan, its memory and its time, and end: scripts/plan.py --here, which has more options"
        parser.add_argument("--dry-run", action="store_true", help=plan)
        check = "prove the run and end, training nothing: scripts/check.py, which has more options"
        parser.add_argument("--check", action="store_true", help=check)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config)
    again = [arguments.config, *arguments.overrides]
    if arguments.deepspeed:
        again += ["--deepspeed", arguments.deepspeed]
        config, notes = from_deepspeed(config, arguments.deepspeed, world_size)
        if arguments.overrides:
            notes.append(f"applied last, from the command line: {', '.join(arguments.overrides)}")
        for note in notes:
            say(f"deepspeed: {note}")
    config = override(config, arguments.overrides)
    return Command(config, tuple(again), arguments)
