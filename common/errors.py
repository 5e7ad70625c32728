"""Exceptions for problems that the user can fix, reported by every entry point in one sentence without a traceback."""

import errno
import io
import os
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

# No space, no quota, or a file above the process's size limit (RLIMIT_FSIZE).
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# No permission, a read-only disk, a file in place of a directory, or a directory in place of a file.
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)

BROKEN = (errno.EIO, errno.ESTALE)  # the disk, or the server of a shared disk, fails

# Package -> the file that installs it. Training imports none of them. A package of tasks adds its own.
REQUIREMENTS: dict[str, str] = dict.fromkeys(("matplotlib", "rouge_score", "scipy"), "requirements-eval.txt")


class UserError(Exception):
    """A mistake in a config, a file or a command.

    The message is one sentence that names the file, line or key and the fix. The program exits with code 2 and no
    traceback. Any other exception is a bug and keeps its traceback.
    """


class UnknownFormat(UserError):
    """A whole file is in a format of another version of the code. It is not damaged, so it must not be replaced or set aside."""


class PeerLost(Exception):
    """Another rank has ended, hangs or cannot be reached, so this rank cannot continue.

    The message is one sentence that names the place in the run and the ranks. The program exits with code 3 and no
    traceback: this rank itself is sound, and the same command continues from the last checkpoint. `quiet`: another rank of
    the node has already printed the message.
    """

    EXIT_CODE = 3

    def __init__(self, sentence: str, quiet: bool = False) -> None:
        super().__init__(sentence)
        self.quiet = quiet


class NotMet(Exception):
    """A result misses a requirement of the user. The result is kept; the program prints one sentence and exits with code 3."""


def missing_package(error: BaseException) -> str:
    """Return a sentence that asks for a package of `REQUIREMENTS` whose import failed; "" for any other error."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package not in REQUIREMENTS:
        return ""
    return f"this command needs {package}: pip install -r {REQUIREMENTS[package]} -c constraints.txt"


def _ask_for_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line and exit with code 2 for a UserError or a missing package of `REQUIREMENTS`. Print other exceptions as usual.

    Scripts import modules before they call `run_script`, and then only the interpreter's hook sees the error.
    """
    if sentence := str(error) if isinstance(error, UserError) else missing_package(error):
        if _is_first_to_print(sentence):
            _print_error(sentence)
        exit_process(2)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _ask_for_package


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run `main()` and exit with the code that `exit_code_of` returns.

    A character that the terminal's encoding lacks, or a byte of a file name that is not UTF-8, is printed as its code.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    exit_process(exit_code_of(main))


def exit_code_of(main: Callable[[], int | None]) -> int:
    """Run `main()` and return the exit code.

    `UserError`, a missing package of `REQUIREMENTS`, a full or failing disk, and a file that the user may not use print one line
    to stderr and return 2.
    `PeerLost` and `NotMet` print one line and return 3. Ctrl-C returns 130.
    """
    code = 2
    try:
        return main() or 0
    except (UserError, NotMet) as error:
        sentence, code = str(error), 3 if isinstance(error, NotMet) else 2
    except ModuleNotFoundError as error:
        sentence = missing_package(error)
        if not sentence:
            raise
    except PeerLost as error:
        if not error.quiet:
            _print_error(str(error))
        return PeerLost.EXIT_CODE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in DISK_FULL:
            sentence = f"{where}the disk is full; free some space and run the same command again"
        elif error.errno in BROKEN:
            sentence = f"{where}{error.strerror}; mend the disk and run the same command again"
        elif where and error.errno in NOT_OURS:
            sentence = f"{where}{error.strerror}; look at what is there and whose it is, or name another place"
        else:
            raise
    except KeyboardInterrupt:
        return 130
    if _is_first_to_print(sentence):
        _print_error(sentence)
    return code


def _print_error(sentence: str) -> None:
    with suppress(OSError):  # the reader may have closed the pipe; the exit code still tells
        print(f"error: {sentence}", file=sys.stderr, flush=True)


def _is_first_to_print(sentence: str) -> bool:
    """Return whether no other rank of this node has printed this sentence yet. Usually all ranks have the same error.

    The first rank creates a file in the temporary directory that torchrun made for this start. Other launchers have no such
    directory; under them only the first rank of the node prints.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"
    first = Path(error_file).parents[1] / f"printed-{zlib.crc32(sentence.encode(errors='replace')):08x}"
    try:
        first.touch(exist_ok=False)
    except OSError:
        return not first.exists()
    return True


def exit_process(code: int) -> NoReturn:
    """Exit with `code`. Under torchrun (or any launcher that sets RANK), skip interpreter shutdown.

    gloo's threads outlive the process group. If one of them releases a Python-owned tensor during interpreter
    shutdown, the process aborts, so a finished run would occasionally end in SIGABRT (pytorch#179291).
    """
    if "RANK" in os.environ:  # the same condition as in start_process_group
        with suppress(OSError):  # the reader may have closed the pipe
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
