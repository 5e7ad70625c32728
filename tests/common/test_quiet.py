"""What a user reads is our own text alone, whichever libraries are installed."""

import pytest

from tests.processes import run_python

LOAD = "import common, sys; from transformers import PreTrainedModel; print('torchao' in sys.modules)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "first"),
    [
        (("-c", LOAD), "True"),  # transformers has loaded torchao, which complains of its compiled parts
        (("train.py", "--help"), "usage: train.py"),
        (("scripts/plan.py", "--help"), "usage: plan.py"),
    ],
)
def test_no_library_speaks(command, first) -> None:
    pytest.importorskip("torchao")
    done = run_python(*command, fresh=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith(first), done.stdout
