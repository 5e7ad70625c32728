"""The arm of our own train.py, started as a user starts it, with a generated config."""

import json
import sys
from pathlib import Path

from bench.spec import Spec

CONFIG = """\
from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding

config = Config(
    model=Model(path={model!r}, compute_dtype={dtype!r}),
    data=Data(train=({train!r},), sequence_length={sequence_length}, cache=None),
    batch=Batch(global_examples={batch}, micro_batch={rows}),
    optimizer=Optimizer(
        learning_rate={learning_rate}, epochs=1, max_steps={max_steps}, warmup_ratio={warmup_ratio}, min_lr_ratio={min_lr_ratio},
        weight_decay={weight_decay}, betas={betas}, eps={eps}, max_grad_norm={max_grad_norm},
    ),
    sharding=Sharding(strategy={strategy!r}),
    run=Run(name="run", directory={directory!r}),
)
"""


def command(spec: Spec, ranks: int) -> list[str]:
    """Write the config of `spec` and return the command that trains with it.

    `parity`, `matched` and `skewed`: constant learning rate and fully sharded parameters. `defaults`: the settings of
    configs/quickstart.py except for the batch size, that is a cosine schedule with warm-up and parameters that are gathered
    once per step.
    """
    defaults = spec.setting == "defaults"
    text = CONFIG.format(
        model=spec.model,
        dtype=spec.dtype,
        train=spec.jsonl,
        sequence_length=spec.sequence_length,
        batch=spec.batch,
        rows=spec.rows,
        learning_rate=3e-4 if defaults else spec.learning_rate,
        max_steps=spec.max_steps,
        warmup_ratio=0.05 if defaults else 0.0,
        min_lr_ratio=0.1 if defaults else 1.0,
        weight_decay=spec.weight_decay,
        betas=tuple(spec.betas),
        eps=spec.eps,
        max_grad_norm=spec.max_grad_norm,
        strategy="grad_op" if defaults else "full",
        directory=spec.directory,
    )
    config = Path(spec.directory) / "bench_config.py"
    config.write_text(text, encoding="utf-8")
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "train.py", str(config)]


def metrics_file(spec: Spec) -> Path:
    """The file to which train.py writes its metrics."""
    return Path(spec.directory) / "run" / "metrics.jsonl"


def read_row(line: str, spec: Spec) -> dict | None:
    """A training row of metrics.jsonl with the keys of `bench.peer.StepLog`; None for other rows (validation)."""
    row = json.loads(line)
    if "train/loss" not in row:
        return None
    examples = spec.steps[row["step"] - 1]
    lengths = [spec.lengths[i] for i in examples]
    return {
        "step": row["step"],
        "loss": row["train/loss"],
        "seconds": sum(lengths) / row["train/tokens_per_second"],
        "lengths": lengths,
        "targets": sum(spec.targets[i] for i in examples),
        "memory_gib": row["train/memory_gib"],
    }
