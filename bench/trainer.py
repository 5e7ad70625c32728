"""The arm `transformers.Trainer`: python -m bench.trainer SPEC.json

matched, skewed: the examples of our step, `micro_batch` of them in one forward pass, bf16 autocast over fp32 weights (`bf16=True`), no activation
checkpointing. The examples are padded to the longest of the batch, or flattened into one row
(`DataCollatorWithFlattening`). Under SDPA transformers infers the documents from the position ids and masks them from each
other, so there is no cross-document attention, but the mask has (tokens of the row)^2 elements.
defaults: the settings of transformers' fine-tuning tutorial (docs/source/en/training.md): 2 examples x 8 accumulation
steps, padded, bf16, gradient checkpointing, learning rate 2e-5; everything else as in `TrainingArguments`.
"""

import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench.peer import CountingCollator, StepLog, load_examples
from bench.spec import Spec, read_spec

TUTORIAL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
    "bf16": True,
    "learning_rate": 2e-5,
}


class StepLogCallback(TrainerCallback):
    """Logs a step for each loss that Trainer logs; with logging_steps=1 that is every step."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # noqa: ANN001, ANN003
        """Called by Trainer."""
        if "loss" in (logs or {}):
            self.log.finished_step(float(logs["loss"]))


def matched_arguments(spec: Spec) -> dict:
    """`TrainingArguments` for the same optimizer, schedule, order of examples and batch as ours."""
    return {
        "per_device_train_batch_size": spec.micro_batch,
        "gradient_accumulation_steps": spec.batch // spec.micro_batch,
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


def output_arguments(spec: Spec) -> dict:
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


def main() -> None:
    """Train as the specification says."""
    spec = read_spec(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto" if spec.setting == "defaults" else "float32")
    arguments = TUTORIAL if spec.setting == "defaults" else matched_arguments(spec)
    log = StepLog(spec, arguments.get("gradient_accumulation_steps", 1))
    collate = DataCollatorWithFlattening() if spec.packed else DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments, **output_arguments(spec)),
        train_dataset=load_examples(spec),
        data_collator=CountingCollator(collate, log),
        callbacks=[StepLogCallback(log)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
