"""The one exception for mistakes that the user can mend, and how every entry point reports it."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """A mistake in a config, a file or a command: one sentence that names the file, line or key and what to do.

    It ends the program with exit code 2 and no traceback. Anything else that is raised is a bug and keeps its own.
    """


def run_hint(path: str | Path) -> str:
    """The end of a sentence about a folder that holds no model: where the model is, if the folder is a run's."""
    export = Path(path) / "export"
    return f"; it is a run, whose model is {export}" if export.is_dir() else ""


def exit_with_one_sentence(main: Callable[[], int | None]) -> None:
    """Run `main()` as a script and exit with the code of `exit_code_of`."""
    leave(exit_code_of(main))


def exit_code_of(main: Callable[[], int | None]) -> int:
    """Run `main()`: a `UserError` or a full disk becomes one line on stderr and 2; Ctrl-C becomes 130."""
    try:
        return main() or 0
    except UserError as error:
        sentence = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        sentence = f"{where}the disk is full; free some room and run the same command again"
    except KeyboardInterrupt:
        return 130
    if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun the others would only repeat it
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 2


def leave(code: int) -> NoReturn:
    """End the program; under torchrun (or what else sets RANK) without taking the interpreter down.

    gloo's threads outlive the process group, and one that lets go of a tensor that Python made while the interpreter is
    taken down aborts the process: a finished run would end in SIGABRT, now and then (pytorch#179291).
    """
    if "RANK" in os.environ:  # as in start_process_group
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
