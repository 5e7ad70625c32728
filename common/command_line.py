"""Command lines of the scripts: help from docstrings, subcommands, checked numbers."""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports unknown arguments in one sentence."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            raise UserError(f"{message} ({self.prog} --help)")
        super().error(message)


def new_parser(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose --help shows the docstring `description` as it is written."""
    return _Parser(
        prog=prog,
        description=inspect.cleandoc(description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main_of(
    description: str | None, *commands: Callable[[argparse.ArgumentParser], int | None]
) -> Callable[[], int | None]:
    """Return the `main` of a script with subcommands. The first word on the command line names the subcommand.

    A subcommand is a function of that name. It gets a parser that shows its docstring, adds its options, parses, and acts. It
    imports its libraries itself, so that no subcommand waits for the imports of another.
    """

    def main() -> int | None:
        known = {command.__name__: command for command in commands}
        summaries = [
            f"  {name:12} {(inspect.getdoc(command) or name).splitlines()[0]}" for name, command in known.items()
        ]
        parser = new_parser("\n".join([inspect.cleandoc(description or ""), "", "commands:", *summaries]))
        parser.add_argument("command", choices=list(known), help="its options: COMMAND --help")
        name = parser.parse_args(sys.argv[1:2]).command
        del sys.argv[1]
        return known[name](new_parser(known[name].__doc__, f"{parser.prog} {name}"))

    return main


def add_number(
    parser: argparse._ActionsContainer,
    name: str,
    help: str,
    default: float | None = None,
    least: float | None = None,
    kind: type[int] | type[float] | None = None,
    **more: Any,
) -> None:
    """Add an option whose value is a number of the type of `default`, an integer without a default, or `kind` if that is set.

    Parsing raises UserError for anything else and for numbers below `least`. `more` goes to `add_argument`.
    """
    kind = kind or (float if isinstance(default, float) else int)

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise UserError(f"{name} must be a{' whole' * (kind is int)} number in digits, not {text}") from None
        if least is not None and not value >= least:
            raise UserError(f"{name} must be {least} or more, not {value}")
        return value

    shown = "" if default is None else " (%(default)s)"
    parser.add_argument(name, type=number, default=default, help=help + shown, **more)


def check_new(out: Path) -> None:
    """Raise UserError if `out`, the value of --out, exists."""
    if out.exists():
        raise UserError(f"{out} exists; remove it or choose another --out")


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Let the reader of the output, such as `head`, close the pipe early: inside the block this is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process


def moved(new: str, note: str = "its options are the same") -> int:
    """Print the new path of the command that was started and `note`, and return the exit code 2."""
    print(f"error: {sys.argv[0]} is now {new}; {note}", file=sys.stderr)
    return 2
