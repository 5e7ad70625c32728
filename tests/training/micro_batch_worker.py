"""Two ranks with unequal free memory settle the micro-batch; each writes it to RESULT.rank<rank>.json.

torchrun --nproc_per_node=2 tests/training/micro_batch_worker.py MODEL RESULT
"""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from distributed.rendezvous import join
from model.architectures import read_model_config
from model.language_model import build_on_meta
from model.memory import full_memory, layout_of, shape_of
from tests.tiny import write_tiny_model
from training import micro_batch

rank, (folder, result) = int(os.environ["RANK"]), map(Path, sys.argv[1:3])
path = str(write_tiny_model(folder.with_suffix(f".rank{rank}")))
shape = read_model_config(path)
config = Config(
    Model(path, compute_dtype="fp32"),
    Data(("a",), sequence_length=100),
    Batch(global_examples=64, micro_batch="auto"),
    Optimizer(1e-5),
    Run("r", timeout_minutes=5),
)
layout, model_shape = layout_of(config, 2, 2, "cpu"), shape_of(build_on_meta(shape), shape)
rows = 9 if rank == 0 else 3
between = [full_memory(model_shape, config, layout, count).tensors for count in (rows, rows + 1)]
free = int(sum(between) / 2 / micro_batch.USABLE["cpu"])
micro_batch.free_bytes = lambda device, local_world: free


def settle(directory: Path) -> int:
    settled = micro_batch.settle_micro_batch(config, build_on_meta(shape), shape, directory, 2, lambda text: None)
    return settled.batch.rows


found = {"rows": settle(folder / "none")}
resumed = folder.with_name(f"run.rank{rank}")  # rank 1 sees another record than rank 0, or an old one
(resumed / "checkpoints" / "step-000001").mkdir(parents=True)
record = {"config": {"batch": {"micro_batch": 4 + rank}, "sharding": {}}, "world_size": 2}
(resumed / "config.json").write_text(json.dumps(record))
found["resumed"] = settle(resumed)
try:  # rank 1 has a number in its config, and comes to the start of the process group
    join(5, "size of the micro-batch") if rank == 0 else join(5)
except UserError as error:
    found["refused"] = str(error)
result.with_suffix(f".rank{rank}.json").write_text(json.dumps(found))
