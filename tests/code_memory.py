"""The code that train.py loads, read once for all launches of a test session: every start of a run hashes all of it.

A launch of tiny runs would spend a quarter of its time on that. The memory is a file of the session (conftest.py names it), with what
training.identity reads in each module: by its path, time and size.
"""

import functools
import json
import os
from pathlib import Path

VARIABLE = "CODE_MEMORY"


def remember_code() -> None:
    """Let `training.identity` of this process read only what no earlier launch has read. No run of a launch changes the code."""
    import training.identity

    memory = Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None
    known = json.loads(memory.read_text()) if memory and memory.is_file() else {}
    read_module, code_of = training.identity.read_module, training.identity.code_of

    def read_once(file: Path) -> tuple[list[tuple[str, bool]], str]:
        status = file.stat()
        key = f"{file} {status.st_mtime_ns} {status.st_size}"
        if key not in known:
            known[key] = read_module(file)
        imports, digest = known[key]
        return [(name, is_late) for name, is_late in imports], digest

    @functools.cache
    def code_once(script: Path, scores: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
        before, found = len(known), code_of(script, scores)
        if memory and len(known) > before:
            new = memory.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(known))
            new.replace(memory)  # of ranks that write at once the last one stays
        return found

    training.identity.read_module, training.identity.code_of = read_once, code_once
