"""The command line of train.py, up to the check that the model directory exists. No training starts."""

import json

import pytest

from tests.processes import ROOT, run_python

CONFIG = """
import gc
from configs.config import *
print("collector:", gc.isenabled())
config = Config(Model("nowhere"), Data(("a.jsonl",)), Batch(global_examples=8), Optimizer(1e-4), Run("r"))
"""


@pytest.mark.slow
def test_command_line_overrides_deepspeed_and_config(tmp_path) -> None:
    (tmp_path / "config.py").write_text(CONFIG)
    file = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8}
    (tmp_path / "ds.json").write_text(json.dumps(file))
    # There are overrides before and after the option. Both are applied after the DeepSpeed file.
    arguments = ["batch.micro_batch=1", "--deepspeed", "ds.json", "model.path=elsewhere", "sharding.strategy=full"]
    done = run_python(ROOT / "train.py", "config.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: model.path=elsewhere is not a directory" in done.stderr
    assert "deepspeed: sharding.strategy: full -> grad_op (zero_optimization.stage=2)" in done.stdout
    assert "batch.global_examples: 8 -> 16 (" in done.stdout
    assert (
        "applied last, from the command line: batch.micro_batch=1, model.path=elsewhere, sharding.strategy=full"
        in done.stdout
    )
    assert done.stdout.count("collector: True\n") == 2  # before libraries are imported, and when the run begins
    assert not (tmp_path / "runs").exists()
