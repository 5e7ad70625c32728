"""The arm LitGPT, `litgpt finetune_full`: python -m bench.litgpt SPEC.json; first run with --convert MODEL DIRECTORY.

LitGPT's own `setup` runs unchanged on its own model code. We only replace its logger and its data module, which returns our
tokens. LitGPT pads and cannot pack.
matched: the examples of our step in one forward pass, bf16-mixed, constant learning rate.
defaults: 16 examples per step, one per forward pass, bf16-mixed, the defaults of torch's AdamW, 100 warm-up steps, as in
litgpt/finetune/full.py.

LitGPT has neither tied embeddings nor gradient clipping. SmolLM2 ties embedding and head; here they are two matrices of 28M
parameters that are both trained. `with_missing_features` adds both features, to show that nothing else differs.
"""

import os
import sys
from pathlib import Path

import litgpt.finetune.full as full
import torch
from lightning.fabric.loggers.logger import Logger
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.data.base import get_sft_collate_fn
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from torch.utils.data import DataLoader

from bench.peer import CountingCollator, StepLog, load_examples
from bench.spec import Spec, read_spec


class Tokens(DataModule):
    """Our examples in the order of our steps; in `defaults` shuffled, as by LitGPT's own data modules."""

    def __init__(self, spec: Spec, log: StepLog) -> None:
        super().__init__()
        self.log, self.shuffle = log, spec.setting == "defaults"
        self.examples = [
            {
                "input_ids": torch.tensor(example["input_ids"]),
                "labels": torch.tensor(example["labels"]),
                "token_counts": {"raw": len(example["labels"]), "raw_plus_prompt_template": len(example["labels"])},
            }
            for example in load_examples(spec)
        ]

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None) -> None:  # noqa: ANN001
        """Called by LitGPT."""
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """Called by LitGPT."""
        collate = CountingCollator(get_sft_collate_fn(), self.log)
        return DataLoader(self.examples, self.batch_size, shuffle=self.shuffle, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        """Called by LitGPT, which requires a validation pass before the first step: a single example."""
        return DataLoader(self.examples[:1], 1, collate_fn=get_sft_collate_fn())


class StepLogger(Logger):
    """Logs a step when LitGPT's step counter increases: LitGPT logs every micro-batch."""

    name, version = "rows", 0

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        """Called by LitGPT."""
        if metrics.get("step", 0) > self.log.step:
            self.log.finished_step(float(metrics["loss"]))

    def log_hyperparams(self, *arguments: object, **options: object) -> None:
        """Called by Lightning."""


def add_missing_features(max_grad_norm: float) -> None:
    """Patch LitGPT to tie embedding and head, and to clip gradients by global norm before each optimizer step."""
    build_model, make_optimizer = full.GPT, full.instantiate_torch_optimizer

    def build_tied_model(config: object) -> torch.nn.Module:
        model = build_model(config)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    def make_clipping_optimizer(optimizer: object, parameters: object, **options: object) -> torch.optim.Optimizer:
        parameters = list(parameters)
        instance = make_optimizer(optimizer, parameters, **options)

        def clip(*_: object) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)

        instance.register_step_pre_hook(clip)
        return instance

    full.GPT, full.instantiate_torch_optimizer = build_tied_model, make_clipping_optimizer


def convert(model: str, directory: str) -> None:
    """Convert the Hugging Face directory `model` to a LitGPT checkpoint in `directory`.

    LitGPT infers the architecture from the name of the directory, so it must be that of the model.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(model).resolve().iterdir():
        if file.is_file() and not (folder / file.name).exists():
            os.symlink(file, folder / file.name)
    convert_hf_checkpoint(folder.resolve())


def main() -> None:
    """Train as the specification says, or convert."""
    if sys.argv[1] == "--convert":
        convert(*sys.argv[2:])
        return
    spec = read_spec(sys.argv[1])
    evaluation = EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, final_validation=False)
    if spec.setting == "defaults":
        log = StepLog(spec, accumulation=16)
        train = TrainArgs(
            save_interval=None, log_interval=1, global_batch_size=16, micro_batch_size=1, lr_warmup_steps=100, epochs=5,
            max_steps=spec.max_steps,
        )  # fmt: skip
        options = {}
    else:
        log = StepLog(spec)
        train = TrainArgs(
            save_interval=None, log_interval=1, global_batch_size=spec.batch, micro_batch_size=spec.batch, epochs=1,
            lr_warmup_steps=0, max_steps=spec.max_steps,
        )  # fmt: skip
        settings = {
            "lr": spec.learning_rate, "weight_decay": spec.weight_decay, "betas": tuple(spec.betas), "eps": spec.eps,
        }  # fmt: skip
        options = {
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": settings},
            "precision": "bf16-mixed" if spec.dtype == "bf16" else "32-true",
        }
        full.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    if spec.with_missing_features:
        add_missing_features(spec.max_grad_norm)
    full.choose_logger = lambda *_, **__: StepLogger(log)
    out = Path(spec.directory) / "out"
    full.setup(
        Path(spec.model).resolve(), out, devices=1, data=Tokens(spec, log), train=train, eval=evaluation, **options
    )


if __name__ == "__main__":
    main()
