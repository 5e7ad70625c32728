"""Train with transformers' Trainer or TRL's SFTTrainer, as one arm of tools/bench.py: python tools/bench_peers.py SPEC.json

matched and skewed: the examples of our step, `micro_batch` of them in a forward pass, bf16 autocast over fp32 weights, the same
AdamW, no activation checkpointing. Examples are padded to the longest of the batch, or flattened into one row (Trainer's
`DataCollatorWithFlattening`, TRL's `padding_free=True`). Under SDPA transformers infers the documents of a row from the position
ids and masks them from each other, so nothing leaks, but the mask has (tokens of the row)^2 elements.
defaults: for Trainer the settings of transformers' fine-tuning tutorial (docs/source/en/training.md): 2 examples x 8
accumulated, bf16, gradient checkpointing, learning rate 2e-5. For TRL `SFTConfig()` unchanged: 8 rows a step, bf16, gradient
checkpointing; packed adds `packing=True`, which fills rows of 1,024 tokens.
"""

import json
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

TUTORIAL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "bf16": True,
    "learning_rate": 2e-5,
}


class StepLog(TrainerCallback):
    """Writes one line of JSON per optimizer step. `micro_batches` counts what the collator made, in order.

    Trainer logs a loss for every step (logging_steps=1), and calls `on_log` then.
    """

    def __init__(self, spec: SimpleNamespace, accumulation: int) -> None:
        self.file = Path(spec.rows_file).open("w", encoding="utf-8")  # noqa: SIM115
        self.cuda, self.accumulation, self.step = spec.device == "cuda", accumulation, 0
        self.micro_batches: deque[tuple[list[int], int]] = deque()  # (lengths, number of targets)
        self.last = time.perf_counter()

    def counting(self, collate: Callable) -> Callable:
        """`collate`, which also notes the real tokens of each micro-batch."""

        def counted(examples: list[dict]) -> object:
            lengths = [n for example in examples for n in example.get("seq_lengths") or [len(example["input_ids"])]]
            targets = sum(int((torch.as_tensor(example["labels"]) != -100).sum()) for example in examples)
            self.micro_batches.append((lengths, targets))
            return collate(examples)

        return counted

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        """Called by Trainer."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.step += 1
        counted = [self.micro_batches.popleft() for _ in range(self.accumulation)]
        row = {
            "step": self.step,
            "loss": float(loss),
            "seconds": now - self.last,
            "lengths": [n for lengths, _ in counted for n in lengths],
            "targets": sum(targets for _, targets in counted),
            "memory_gib": torch.cuda.max_memory_allocated() / 2**30
            if self.cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.last = now


def matched_arguments(spec: SimpleNamespace) -> dict:
    """`TrainingArguments` for the same optimizer, schedule, order of examples and batch as ours."""
    return {
        "per_device_train_batch_size": spec.micro_batch,
        "gradient_accumulation_steps": spec.examples_per_step // spec.micro_batch,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": spec.dtype == "bf16",
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": spec.weight_decay,
        "adam_beta1": spec.betas[0],
        "adam_beta2": spec.betas[1],
        "adam_epsilon": spec.eps,
        "max_grad_norm": spec.max_grad_norm,
    }


def output_arguments(spec: SimpleNamespace) -> dict:
    """`TrainingArguments` that do not affect the training itself: output directory, logging, no saving."""
    return {
        "output_dir": spec.directory + "/out",
        "max_steps": spec.max_steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": spec.device == "cpu",
    }


def make_trainer(spec: SimpleNamespace, examples: list[dict]) -> Trainer:
    """Trainer, with the log of its steps attached."""
    arguments = TUTORIAL if spec.setting == "defaults" else matched_arguments(spec)
    log = StepLog(spec, arguments["gradient_accumulation_steps"])
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    collate = DataCollatorWithFlattening() if spec.packed else DataCollatorForSeq2Seq(tokenizer)
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(
            spec.model, dtype="auto" if spec.setting == "defaults" else "float32"
        ),
        args=TrainingArguments(**arguments, **output_arguments(spec)),
        train_dataset=examples,
        data_collator=log.counting(collate),
        callbacks=[log],
    )


def make_sft_trainer(spec: SimpleNamespace, examples: list[dict]) -> Trainer:
    """The same for TRL."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = {"packing": spec.packed}
    if spec.setting != "defaults":
        arguments = matched_arguments(spec) | {"padding_free": spec.packed, "max_length": None}
    log = StepLog(spec, arguments.get("gradient_accumulation_steps", 1))
    trainer = SFTTrainer(
        model=spec.model,
        args=SFTConfig(**arguments, **output_arguments(spec)),
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        callbacks=[log],
    )
    trainer.data_collator = log.counting(trainer.data_collator)
    return trainer


if __name__ == "__main__":
    spec = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    content = json.loads(Path(spec.tokens).read_text(encoding="utf-8"))
    examples = content["examples"]
    if spec.setting != "defaults":  # in the order of our steps; in defaults in that of the file
        examples = [examples[i] for step in content["steps"] for i in step]
    (make_sft_trainer if spec.trl else make_trainer)(spec, examples).train()
