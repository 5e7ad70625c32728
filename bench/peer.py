"""Shared by the arms of other trainers: the tokenised examples, the log of steps, and the count of real tokens per batch."""

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from bench.spec import Spec
from training.run_log import peak_memory_gib


def load_examples(spec: Spec) -> list[dict]:
    """The examples as `{input_ids, labels}`, with label -100 on tokens without loss.

    Their order is that of our training steps; in `defaults` it is that of the file.
    """
    content = json.loads(Path(spec.tokens).read_text(encoding="utf-8"))
    if spec.setting == "defaults":
        return content["examples"]
    return [content["examples"][i] for step in content["steps"] for i in step]


class CountingCollator:
    """Wraps a trainer's own collator and records the document lengths and target count of each micro-batch, in order."""

    def __init__(self, collate: Callable, log: "StepLog") -> None:
        self.collate, self.log = collate, log

    def __call__(self, examples: list[dict]) -> object:
        lengths = [n for example in examples for n in example.get("seq_lengths") or [len(example["input_ids"])]]
        targets = sum(int((torch.as_tensor(example["labels"]) != -100).sum()) for example in examples)
        self.log.micro_batches.append((lengths, targets))
        return self.collate(examples)


class StepLog:
    """Writes one JSON line per optimizer step to `spec.rows_file`, after waiting for the device.

    accumulation: micro-batches per optimizer step.
    """

    def __init__(self, spec: Spec, accumulation: int = 1) -> None:
        self.file = spec.rows_file.open("w", encoding="utf-8")
        self.device, self.accumulation, self.step = torch.device(spec.device), accumulation, 0
        self.micro_batches: deque[tuple[list[int], int]] = deque()
        self.last = time.perf_counter()

    def finished_step(self, loss: float) -> None:
        """Log an optimizer step that has just finished with training loss `loss`."""
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
