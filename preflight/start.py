"""`train.py CONFIG --check`: prove a run on the user's own config, data, model and machine before it is paid for."""

from configs.loading.command_line import Command


def check_run(command: Command, world_size: int) -> int:
    """Do all checks and print one line each. Returns the exit code. Every rank runs this."""
    raise NotImplementedError
