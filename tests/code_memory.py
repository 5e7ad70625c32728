"""Read the code that train.py loads once per test session, because every start of a run hashes all of it.

A launch of tiny runs would spend a quarter of its time on the hashes. The memory is a file of the session, named by conftest.py. It
has the code of each script that was run, by path, time and size. Within a process each file is read once.
"""

import functools
import json
import os
from pathlib import Path

VARIABLE = "CODE_MEMORY"


def remember_code() -> None:
    """Let `training.identity` in this process read only code that no earlier launch has read.

    This is safe because no test changes a module between two launches.
    """
    import training.identity

    memory = Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None
    known = json.loads(memory.read_text()) if memory and memory.is_file() else {}
    code_of = training.identity.code_of
    # Copies of train.py import the same modules: a process reads each of them once.
    training.identity.read_module = functools.cache(training.identity.read_module)

    def code_once(script: Path, scores: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
        status = script.stat()
        key = f"{script.resolve()} {status.st_mtime_ns} {status.st_size} {scores}"
        if key not in known:
            known[key] = code_of(script, scores)
            if memory:
                new = memory.with_suffix(f".{os.getpid()}")
                new.write_text(json.dumps(known))
                new.replace(memory)  # of ranks that write at once, the last one wins
        code, more = known[key]
        return dict(code), dict(more)

    training.identity.code_of = code_once
