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
    """What train.py was asked for. It trains unless `check` is set."""

    config: Config
    arguments: tuple[str, ...]  # that give this config again: the file, the overrides, --deepspeed FILE
    check: bool = False  # prove the run before it is paid for (preflight/)
    layers: int | None = None  # check: only the first decoder layers, at full width
    json: str | None = None  # check: the file for the results


def read_command_line(description: str | None, world_size: int, say: Callable[[str], None]) -> Command:
    """Parse sys.argv. `say` gets a line per DeepSpeed setting. Raises UserError."""
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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--check", action="store_true", help="train nothing: check data, model, precision, resume and machine"
    )
    plan = "print the plan, its memory and its time, and end: scripts/plan.py --here, which has more options"
    instead.add_argument("--dry-run", action="store_true", help=plan)
    parser.add_argument(
        "--layers", type=int, metavar="N", help="with --check: a model of the first N decoder layers, at full width"
    )
    parser.add_argument("--json", metavar="FILE", help="with --check or --dry-run: also write the results to FILE")
    arguments = parser.parse_intermixed_args()
    _check_options(arguments)
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
    return Command(config, tuple(again), arguments.check, arguments.layers, arguments.json)


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.layers is not None and not arguments.check:
        raise UserError("--layers is an option of --check: a run trains all layers")
    if arguments.layers is not None and arguments.layers < 1:
        raise UserError(f"--layers must be 1 or more, not {arguments.layers}")
    if arguments.json and not arguments.check:
        raise UserError("--json is an option of --check and --dry-run: a run writes its curves to metrics.jsonl")
    if arguments.json and int(os.environ.get("RANK", 0)) == 0:  # which writes it; other nodes may lack the directory
        check_can_write(Path(arguments.json), "--json")
