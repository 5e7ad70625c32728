"""Train with transformers' Trainer or TRL's SFTTrainer, as one arm of the benchmark: python -m scripts.bench.peers SPEC.json

matched and skewed: the examples of our step, `micro_batch` examples in a forward pass, bf16 autocast over fp32 weights, the same
AdamW, no activation checkpointing. Examples are padded to the longest of the batch, or flattened into one row (Trainer's
`DataCollatorWithFlattening`, TRL's `padding_free=True`). Under SDPA transformers infers the documents of a row from the position
ids and masks them from each other, so nothing leaks, but the mask has (tokens of the row)^2 elements.
defaults: for Trainer the settings of transformers' fine-tuning tutorial (docs/source/en/training.md): 2 examples x 8
accumulated, bf16, gradient checkpointing, learning rate 2e-5. For TRL `SFTConfig()` unchanged: 8 rows a step, bf16, gradient
checkpointing; packed adds `packing=True`, which fills rows of 1,024 tokens.
"""

import common  # noqa: F401, I001  first: it silences warnings of the libraries that transformers imports

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

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

from training.log import peak_memory_gib, seconds_since_process_start

TUTORIAL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "bf16": True,
    "learning_rate": 2e-5,
}


class StepLog(TrainerCallback):
    """A callback that writes metrics.jsonl with the curves that the benchmark reads.

    Trainer calls `on_log` after every step (logging_steps=1), with a loss, and with the real tokens so far
    (include_num_input_tokens_seen).
    """

    def __init__(self, spec: SimpleNamespace) -> None:
        directory = Path(spec.directory, "run")
        directory.mkdir()
        self.file = (directory / "metrics.jsonl").open("w", encoding="utf-8")  # noqa: SIM115
        self.device, self.tokens, self.last = torch.device(spec.device), 0, time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        """Write the row of a step. Trainer calls this."""
        if not logs or "loss" not in logs:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now, tokens = time.perf_counter(), int(logs["num_input_tokens_seen"])
        if not self.tokens:
            self.write({"step": 0, "start/total": seconds_since_process_start()})
        self.write(
            {
                "step": state.global_step,
                "train/loss": float(logs["loss"]),
                "train/tokens": tokens,
                "train/tokens_per_second": (tokens - self.tokens) / (now - self.last),
                "train/memory_gib": peak_memory_gib(self.device),
            }
        )
        self.tokens, self.last = tokens, now

    def write(self, row: dict) -> None:
        """Write a row as a line of JSON."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def matched_arguments(spec: SimpleNamespace) -> dict:
    """Return `TrainingArguments` for the same optimizer, schedule, order of examples and batch as ours."""
    return {
        "per_device_train_batch_size": spec.micro_batch,
        "gradient_accumulation_steps": spec.examples_per_step // spec.micro_batch,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": spec.dtype == "bf16",
        "learning_rate": spec.optimizer["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": spec.optimizer["weight_decay"],
        "adam_beta1": spec.optimizer["betas"][0],
        "adam_beta2": spec.optimizer["betas"][1],
        "adam_epsilon": spec.optimizer["eps"],
        "max_grad_norm": spec.optimizer["max_grad_norm"],
    }


def output_arguments(spec: SimpleNamespace) -> dict:
    """Return `TrainingArguments` that do not affect the training itself: output directory, logging, no saving."""
    return {
        "output_dir": spec.directory + "/out",
        "max_steps": spec.max_steps,
        "logging_steps": 1,
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": spec.device == "cpu",
    }


def make_trainer(spec: SimpleNamespace, examples: list[dict]) -> Trainer:
    """Return transformers' Trainer."""
    arguments = TUTORIAL if spec.setting == "defaults" else matched_arguments(spec)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    collate = DataCollatorWithFlattening() if spec.packed else DataCollatorForSeq2Seq(tokenizer)
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(
            spec.model, dtype="auto" if spec.setting == "defaults" else "float32"
        ),
        args=TrainingArguments(**arguments, **output_arguments(spec)),
        train_dataset=cast(Any, examples),  # Trainer needs only its length and items
        data_collator=collate,
        callbacks=[StepLog(spec)],
    )


def make_sft_trainer(spec: SimpleNamespace, examples: list[dict]) -> Trainer:
    """Return TRL's SFTTrainer."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    arguments = {"packing": spec.packed}
    if spec.setting != "defaults":
        arguments = matched_arguments(spec) | {"padding_free": spec.packed, "max_length": None}
    return SFTTrainer(
        model=spec.model,
        args=SFTConfig(**arguments, **output_arguments(spec)),
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        callbacks=[StepLog(spec)],
    )


if __name__ == "__main__":
    spec = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    examples = [*map(json.loads, Path(spec.data, "train.jsonl").read_text(encoding="utf-8").splitlines())]
    if spec.setting != "defaults":  # `defaults` keeps the order of the file
        steps = json.loads(Path(spec.data, "steps.json").read_text(encoding="utf-8"))
        examples = [examples[i] for step in steps for i in step]
    (make_sft_trainer if spec.trl else make_trainer)(spec, examples).train()
