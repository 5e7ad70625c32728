"""Imports and output of a program of ours at its start, in a new interpreter: few modules, no lines and no code of others."""

import os
import subprocess

import pytest
from transformers import AutoModelForCausalLM

from tests.processes import run_python
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.slow
# Not needed before the first step of a run. transformers imports more such packages if they are installed.
NOT_FOR_TRAINING = (
    "arelle",
    "distributed.context",  # only if ranks share the tokens of a micro-batch
    "data.remote",  # only for a run with remote data
    "cyclonedx",  # only for a release, like model_signing
    "configs.deepspeed",  # only for a run with a DeepSpeed JSON file
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
    """Import train.py; then import torchao through transformers, which complains of compiled parts; then run scripts/plan.py."""
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
    """The user reads only our own text, whichever libraries are installed."""
    pytest.importorskip("torchao")
    assert started.stderr == ""
    assert started.stdout.splitlines()[1:2] == ["torchao True"] and "\nusage: plan.py" in started.stdout, started.stdout


def test_no_layer_is_replaced_by_code_of_the_hub(tmp_path) -> None:
    assert os.environ["USE_HUB_KERNELS"] == "NO"
    assert not AutoModelForCausalLM.from_pretrained(
        write_tiny_model(tmp_path)
    ).use_kernels  # transformers 5.25: by default
