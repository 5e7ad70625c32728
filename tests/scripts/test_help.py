"""Every script prints its --help when it is started from the root, without installing the project."""

import pytest

from tests.processes import ROOT, run_python

FRESH = "evaluate.py"  # in a new interpreter; the others are forked from one that has imported torch and transformers


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.py")))
def test_help(script) -> None:
    result = run_python(f"scripts/{script}", "--help", fresh=script == FRESH)
    assert result.returncode == 0 and result.stdout.startswith(f"usage: {script}"), result.stderr
