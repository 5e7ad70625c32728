"""What the peers' arms share: the tokenised examples, a line a step, and counting what is real in a batch."""

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from bench.spec import Spec
from training.run_log import peak_memory_gib


def load_examples(spec: Spec) -> list[dict]:
    """`{input_ids, labels}` an example, labels -100 where no loss is: in the order of our steps, or of the file in `defaults`."""
    content = json.loads(Path(spec.tokens).read_text(encoding="utf-8"))
    if spec.setting == "defaults":
        return content["examples"]
    return [content["examples"][d] for step in content["steps"] for d in step]


class CountingCollator:
    """Calls the arm's own collator and remembers the documents' lengths and targets of each micro-batch, in order."""

    def __init__(self, collate: Callable, log: "StepLog") -> None:
        self.collate, self.log = collate, log

    def __call__(self, examples: list[dict]) -> object:
        lengths = [n for example in examples for n in example.get("seq_lengths") or [len(example["input_ids"])]]
        targets = sum(int((torch.as_tensor(example["labels"]) != -100).sum()) for example in examples)
        self.log.micro_batches.append((lengths, targets))
        return self.collate(examples)


class StepLog:
    """A line a finished step, in the form that scripts/bench.py reads. The host waits for the device at each."""

    def __init__(self, spec: Spec, accumulation: int = 1) -> None:
        self.file = spec.rows.open("w", encoding="utf-8")
        self.device, self.accumulation, self.step = torch.device(spec.device), accumulation, 0
        self.micro_batches: deque[tuple[list[int], int]] = deque()
        self.last = time.perf_counter()

    def finished_step(self, loss: float) -> None:
        """Call after each optimizer step, `loss` being a number that the host has."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.step += 1
        counted = [self.micro_batches.popleft() for _ in range(self.accumulation)]
        row = {
            "step": self.step,
            "loss": loss,
            "seconds": now - self.last,
            "lengths": [n for lengths, _ in counted for n in lengths],
            "targets": sum(targets for _, targets in counted),
            "memory_gib": peak_memory_gib(self.device),
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.last = now
