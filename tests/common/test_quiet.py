"""What a program of ours loads and says when it starts, in one new interpreter: the least of the first, and nothing of libraries."""

import subprocess

import pytest

from tests.processes import run_python

pytestmark = pytest.mark.slow
# Not needed before the first step of a run. transformers imports others that are not needed either, where they are installed.
NOT_FOR_TRAINING = (
    "arelle",
    "distributed.context",  # only where ranks share the tokens of a micro-batch
    "data.remote",  # only for a run whose data lie elsewhere
    "cyclonedx",  # only for a release, as model_signing
    "configs.deepspeed",  # only for a run that names a DeepSpeed JSON
    "gguf",
    "lxml",
    "matplotlib",
    "model_signing",
    "pandas",
    "peft",
    "pyarrow",
    "rouge_score",
    "sklearn",
    "tensorboard",  # rank 0 imports it later
    "torchvision",
)


@pytest.fixture(scope="module")
def started() -> subprocess.CompletedProcess:
    """train.py is imported; then torchao, which complains of its compiled parts, by transformers; then scripts/plan.py is run."""
    program = f"""
import gc, runpy, sys
gc.disable()  # as train.py does
import train
print("loaded", *sorted(set({NOT_FOR_TRAINING!r}) & sys.modules.keys()))
from transformers import PreTrainedModel
print("torchao", "torchao" in sys.modules)
sys.argv = ["scripts/plan.py", "--help"]
runpy.run_path("scripts/plan.py", run_name="__main__")
"""
    done = run_python("-c", program, fresh=True)
    assert done.returncode == 0, done.stderr
    return done


def test_train_imports_nothing_that_it_does_not_use(started) -> None:
    assert started.stdout.splitlines()[0].split() == ["loaded"]


def test_no_library_speaks(started) -> None:
    """What a user reads is our own text alone, whichever libraries are installed."""
    pytest.importorskip("torchao")
    assert started.stderr == ""
    assert started.stdout.splitlines()[1:2] == ["torchao True"] and "\nusage: plan.py" in started.stdout, started.stdout
