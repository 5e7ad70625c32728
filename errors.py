"""The one exception for mistakes that the user can mend, and how every entry point reports it."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in a config, a file or a command: one sentence that names the file, line or key and what to do.

    It ends the program with exit code 2 and no traceback. Anything else that is raised is a bug and keeps its own.
    """


def exit_with_one_sentence(main: Callable[[], int | None]) -> None:
    """Run `main()` as a script: a `UserError` becomes one line on stderr and exit code 2; Ctrl-C becomes exit code 130."""
    try:
        sys.exit(main())
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun the others would only repeat it
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
