"""The exceptions for what the user can mend without a traceback, and how all entry points report them."""

import errno
import io
import os
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# No space, no quota, or a file that may not grow (RLIMIT_FSIZE).
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# No permission, a read-only disk, a file where a directory is meant, or a directory where a file is.
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)

BROKEN = (errno.EIO, errno.ESTALE)  # the disk fails, or the server that has it


class UserError(Exception):
    """A mistake in a config, a file or a command.

    The message is one sentence that names the file, line or key and the fix. The program exits with code 2 and no
    traceback. Any other exception is a bug and keeps its traceback.
    """


class PeerLost(Exception):
    """Another rank has ended, hangs or cannot be reached, so this one cannot go on.

    The message is one sentence that names the place in the run and the ranks. The program exits with code 3 and no
    traceback: nothing is wrong with this rank, and the same command continues from the last checkpoint. `quiet`: a rank on
    the same node has said it already.
    """

    EXIT_CODE = 3

    def __init__(self, sentence: str, quiet: bool = False) -> None:
        super().__init__(sentence)
        self.quiet = quiet


class NotMet(Exception):
    """What the user demands of a result does not hold. One sentence, exit code 3, no traceback; the result is there."""


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run `main()` and exit with the code that `exit_code_of` returns.

    What the encoding of the terminal lacks is printed as its code: a sign, or a byte of a file's name that is not UTF-8.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    exit_process(exit_code_of(main))


def exit_code_of(main: Callable[[], int | None]) -> int:
    """Run `main()` and return the exit code.

    A `UserError`, a disk that is full or fails, or a file that the user may not use prints one line to stderr and returns 2, `PeerLost` and
    `NotMet` one line and 3. Ctrl-C returns 130.
    """
    code = 2
    try:
        return main() or 0
    except (UserError, NotMet) as error:
        sentence, code = str(error), 3 if isinstance(error, NotMet) else 2
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
    if _is_first_to_say(sentence):
        _print_error(sentence)
    return code


def _print_error(sentence: str) -> None:
    with suppress(OSError):  # whoever read it may be gone; the exit code still says it
        print(f"error: {sentence}", file=sys.stderr, flush=True)


def _is_first_to_say(sentence: str) -> bool:
    """Whether no other rank of this node has said the same: mostly all ranks have the same error, but not always.

    The ranks of a node leave a mark in the temporary directory that torchrun made for this start. Another launcher has no
    such directory, and only its first rank speaks.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"
    first = Path(error_file).parents[1] / f"said-{zlib.crc32(sentence.encode(errors='replace')):08x}"
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
        with suppress(OSError):  # whoever read it may be gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
