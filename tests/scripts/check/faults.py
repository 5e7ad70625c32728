"""Faults in a training loop, planted as a user makes them: by editing a copy of train.py."""

from pathlib import Path

from tests.processes import ROOT

LOSS = "loss = loss_sum / num_targets\n"
STEP = "            optimizer.step()\n"
PARAMETERS = "    parameters = trained_parameters(model)\n"
RATE = 'group["lr"] = rate'
# Name -> (text of train.py, its replacement).
EDITS = {
    "micro-batches averaged": (
        LOSS,
        'loss = loss_sum / max(1, micro_batch.target_ids.numel()) / len(data.deal(state["step"]).items)\n',
    ),
    "last micro-batch dropped": (
        "            before_micro_batch(model",
        "            if is_last:\n                break\n            before_micro_batch(model",
    ),
    "optimizer not restored": (
        "    notes += checkpointer.load(state)\n",
        "    from distributed.checkpoint import load_parameters\n\n"
        "    load_parameters(checkpointer.resume_from, parameters, ranks) if checkpointer.resume_from else None\n",
    ),
    "data by the number of ranks": (
        "    steps = data.steps(",
        "    plan = data.plan\n"
        "    of_ranks = dataclasses.replace(plan, batch=lambda step: plan.batch(step * ranks.world_size % 4))\n"
        "    data = dataclasses.replace(data, plan=of_ranks)\n"
        "    steps = data.steps(",
    ),
    "wrong weights": (
        PARAMETERS,
        f'{PARAMETERS}    parameters["model.layers.0.mlp.down_proj.weight"].data.mul_(1.1)\n',
    ),
    "ranks averaged": (LOSS, "loss = loss_sum / num_targets / ranks.world_size\n"),
    "vectors not updated": (RATE, f'{RATE} * (group["params"][0].dim() >= 2)'),
    "dropout before the head": ("    model.train()\n", "    model.train()\n    add_dropout(model)\n"),
    "gradient of a layer lost": (
        STEP,
        f'            parameters["model.layers.1.mlp.down_proj.weight"].grad.zero_()\n{STEP}',
    ),
}
# The end of every copy: small matrices to measure the peak, one thread, and the functions that the edits call. In its third step
# the run that is killed waits for its SIGKILL, however slow the machine is.
END = """
import dataclasses
import sys
import threading

import model.flops

measured_flops = model.flops.measured_flops
model.flops.measured_flops = lambda device, dtype, size: measured_flops(device, dtype, 64)
torch.set_num_threads(1)
torch.set_num_threads = lambda count: None
rate_of, begun = learning_rate, []


def learning_rate(step: int, *arguments: object) -> float:
    if begun == [0, 1] and "run.name=killed" in sys.argv:
        threading.Event().wait()
    begun.append(step)
    return rate_of(step, *arguments)


def add_dropout(model: torch.nn.Module) -> None:
    forward = model.forward
    model.forward = lambda batch: torch.nn.functional.dropout(forward(batch), 0.1)


if __name__ == "__main__":
"""


def write_train(folder: Path, fault: str | None = None) -> Path:
    """Write a copy of train.py with a fault of EDITS, or with several, as `A and B`. Return its path."""
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    for name in fault.split(" and ") if fault else ():
        old, new = EDITS[name]
        assert text.count(old) == 1, f"train.py has {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    body, _, end = text.rpartition('if __name__ == "__main__":\n')
    path = folder / (f"train_{fault.replace(' ', '_')}" if fault else "train") / "train.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body + END + end, encoding="utf-8")
    return path
