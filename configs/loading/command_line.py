"""The command line of train.py: a config file, `section.key=value` overrides, and optionally a DeepSpeed JSON file.

The DeepSpeed settings are applied to the config before the overrides.
"""

import argparse
from collections.abc import Callable

from configs.config import Config
from configs.loading.config_file import load_config, override
from configs.loading.deepspeed import from_deepspeed


def config_from_command_line(description: str | None, world_size: int, say: Callable[[str], None]) -> Config:
    """Parse sys.argv and return the checked config. `say` gets a line per DeepSpeed setting. Raises UserError."""
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
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config)
    if arguments.deepspeed:
        config, notes = from_deepspeed(config, arguments.deepspeed, world_size)
        if arguments.overrides:
            notes.append(f"applied last, from the command line: {', '.join(arguments.overrides)}")
        for note in notes:
            say(f"deepspeed: {note}")
    return override(config, arguments.overrides)
