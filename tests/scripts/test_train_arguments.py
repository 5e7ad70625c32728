"""The command line of train.py up to where it looks for the model: nothing is started."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
from configs.config import *
config = Config(Model("nowhere"), Data(("a.jsonl",)), Batch(global_examples=8), Optimizer(1e-4), Run("r"))
"""


def test_a_deepspeed_file_stands_between_the_config_and_the_overrides(tmp_path) -> None:
    (tmp_path / "config.py").write_text(CONFIG)
    file = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8}
    (tmp_path / "ds.json").write_text(json.dumps(file))
    # Overrides before and after the option; the last word is the command line's.
    arguments = ["batch.micro_batch=1", "--deepspeed", "ds.json", "model.path=elsewhere", "sharding.strategy=full"]
    command = [sys.executable, str(ROOT / "train.py"), "config.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: model.path=elsewhere is not a directory" in done.stderr
    assert "deepspeed: zero_optimization.stage=2 -> sharding.strategy=grad_op" in done.stdout
    assert "batch.global_examples=16" in done.stdout
    assert (
        "applied last, from the command line: batch.micro_batch=1, model.path=elsewhere, sharding.strategy=full"
        in done.stdout
    )
    assert not (tmp_path / "runs").exists()
