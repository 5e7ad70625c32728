"""The promises in tests/README.md are held by tests that exist."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent


def test_the_tests_that_hold_a_promise_exist() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    table = text.partition("## What may not be lost")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) >= 19
    for row in rows:
        named = re.findall(r"`(\S+?\.py)::(test_\w+)`", row)
        assert named, f"no test holds: {row}"
        for file, test in named:
            path = FOLDER / file
            assert path.exists() and f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test} is missing"
