"""What a user reads is our own text alone, whichever libraries are installed."""

import pytest

from tests.processes import run_python

# transformers loads torchao, which complains of its compiled parts.
LOAD = """
import common, runpy, sys
from transformers import PreTrainedModel
print("torchao" in sys.modules)
sys.argv = ["scripts/plan.py", "--help"]
runpy.run_path("scripts/plan.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "first"),
    [
        (("-c", LOAD), "True\nusage: plan.py"),
        (("train.py", "--help"), "usage: train.py"),
    ],
)
def test_no_library_speaks(command, first) -> None:
    pytest.importorskip("torchao")
    done = run_python(*command, fresh=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith(first), done.stdout
