"""The command line of train.py: a config file, `section.key=value` overrides, and optionally a DeepSpeed JSON file.

The DeepSpeed settings are applied to the config before the overrides.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.durable_files import check_can_write
from common.errors import UserError
from configs.config import Config
from configs.loading.config_file import load_config, override
from configs.loading.deepspeed import from_deepspeed


@dataclass(frozen=True)
class Command:
    """What train.py was asked for. It trains unless `dry_run` is set."""

    config: Config
    arguments: tuple[str, ...]  # that give this config again: the file, the overrides, --deepspeed FILE
    dry_run: bool = False  # print plan, memory and time, and end (planner/)
    json: str | None = None  # dry_run: the file for the results
    options: argparse.Namespace | None = None  # all arguments, with those of `add_options`


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
        help="apply the settings of a DeepSpeed JSON file to the config (docs/migrating.md)",
    )
    if add_options:
        add_options(parser)
    else:
        parser.add_argument("--dry-run", action="store_true", help="print the plan, its memory and its time, and end")
        parser.add_argument("--json", metavar="FILE", help="with --dry-run: also write the results to FILE")
    arguments = parser.parse_intermixed_args()
    if not add_options:
        _check_json(arguments)
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
    if add_options:
        return Command(config, tuple(again), options=arguments)
    return Command(config, tuple(again), arguments.dry_run, arguments.json)


def _check_json(arguments: argparse.Namespace) -> None:
    if arguments.json and not arguments.dry_run:
        raise UserError("--json is an option of --check and --dry-run: a run writes its curves to metrics.jsonl")
    if arguments.json and int(os.environ.get("RANK", 0)) == 0:  # which writes it; other nodes may lack the directory
        check_can_write(Path(arguments.json), "--json")
