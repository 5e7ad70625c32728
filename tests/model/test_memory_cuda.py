"""The computed peak of a step against torch.cuda.max_memory_allocated. Needs a GPU of 12 GiB or more. On a GPU machine:

    PLANNER_ROWS=rows.jsonl bash scripts/test.sh -m gpu tests/model

With two GPUs also FSDP's buffers. The rows, one JSON line for each case, are appended to the file that PLANNER_ROWS names.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.processes import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
WORKER = Path(__file__).with_name("memory_cuda_worker.py")
TOLERANCE = 0.05


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_planned_peak_is_that_of_the_allocator(tmp_path, ranks) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip("needs two GPUs")
    done = run_ranks(ranks, WORKER, tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "rows.jsonl").read_text()
    if "PLANNER_ROWS" in os.environ:
        with open(os.environ["PLANNER_ROWS"], "a", encoding="utf-8") as file:
            file.write(text)
    rows = [json.loads(line) for line in text.splitlines()]
    errors = {
        f"{row['strategy']} {row['memory']} {row['checkpointing']}": row["planned"] / row["measured"] - 1
        for row in rows
    }
    assert all(abs(error) < TOLERANCE for error in errors.values()), errors
