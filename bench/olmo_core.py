"""The arm OLMo-core, `olmo_core.train.Trainer`: python -m bench.olmo_core SPEC.json

OLMo-core's own loop (`Trainer.fit`) runs unchanged with its `TransformerTrainModule`, on its own model code, with the
weights converted by its `convert_state_from_hf`. We only supply a data loader that returns our tokens.
matched, skewed: the examples of our step, padded to the longest of the step, in forward passes of as many tokens as
`micro_batch` of the longest example have; autocast to bf16, no compilation. Packed rows need its flash attention: under
SDPA it refuses document boundaries.
defaults: none. Its examples train from scratch, or need flash attention.

The embedding of the padding token (SmolLM2: <|im_end|>) gets a gradient from the input; in transformers' models, and
therefore in ours, it does not.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from olmo_core.config import DType
from olmo_core.data import DataLoaderBase
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.hf.convert import convert_state_from_hf
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig, OptimGroupOverride
from olmo_core.train import Duration, TrainerConfig, prepare_training_environment
from olmo_core.train.callbacks import Callback
from olmo_core.train.common import TRAIN_CE_LOSS_METRIC
from olmo_core.train.train_module import TransformerTrainModule, TransformerTrainModuleConfig
from safetensors.torch import load_file
from transformers import AutoConfig

from bench.peer import StepLog, load_examples
from bench.spec import Spec, read_spec


class Steps(DataLoaderBase):
    """One batch per step of ours, padded to its longest example. OLMo-core shifts the labels itself."""

    def __init__(self, spec: Spec, log: StepLog) -> None:
        super().__init__(work_dir=spec.directory, global_batch_size=spec.batch * max(spec.lengths))
        self.log, examples = log, load_examples(spec)
        self.steps = [examples[i : i + spec.batch] for i in range(0, len(examples), spec.batch)]

    @property
    def total_batches(self) -> int:
        """Steps in an epoch."""
        return len(self.steps)

    def _iter_batches(self) -> Iterator[dict]:
        for examples in self.steps:
            batch = pad(examples)
            lengths = [len(example["input_ids"]) for example in examples]
            self.log.micro_batches.append((lengths, int(batch["label_mask"].sum())))
            yield batch

    def get_mock_batch(self) -> dict:
        """For the dry run before the first step: a single example."""
        return pad(self.steps[0][:1])

    def reshuffle(self, epoch: int | None = None, **_: object) -> None:
        """No-op: the order is that of our plan."""
        self._epoch = epoch or 1

    def state_dict(self) -> dict:
        """Nothing: no checkpoint is written."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Nothing: no checkpoint is read."""


class LogStep(Callback):
    """Logs a step when its optimizer step is done."""

    log: StepLog

    def post_step(self) -> None:
        """Called by the trainer."""
        self.log.finished_step(float(self.trainer.get_metric(TRAIN_CE_LOSS_METRIC)))


def pad(examples: list[dict]) -> dict:
    """`input_ids` int64 and `label_mask` bool, both `(examples, longest)`. Padding carries no loss."""
    shape = len(examples), max(len(example["input_ids"]) for example in examples)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        ids[row, :length] = torch.tensor(example["input_ids"])
        mask[row, :length] = torch.tensor(example["labels"]) != -100
    return {"input_ids": ids, "label_mask": mask}


def build_train_module(spec: Spec) -> TransformerTrainModule:
    """OLMo-core's Llama of the same shape with the weights of `spec.model`, and our AdamW."""
    config = AutoConfig.from_pretrained(spec.model)
    model = TransformerConfig.llama_like(
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        layer_norm_eps=config.rms_norm_eps,
        rope_theta=int(config.rope_parameters["rope_theta"]),
        feed_forward=FeedForwardConfig(hidden_size=config.intermediate_size, bias=False),
        attn_backend=AttentionBackendName.torch,
        tie_word_embeddings=config.tie_word_embeddings,
    ).build(init_device="meta")
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=spec.micro_batch * max(spec.lengths),  # tokens, padding included
        max_sequence_length=max(spec.lengths),
        optim=AdamWConfig(
            lr=spec.learning_rate,
            betas=tuple(spec.betas),
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            group_overrides=[OptimGroupOverride(params=["*norm*"], opts={"weight_decay": 0.0})],
        ),
        max_grad_norm=spec.max_grad_norm,
        autocast_precision=DType.bfloat16 if spec.dtype == "bf16" else None,
    ).build(model, device=torch.device(spec.device))
    weights = {}
    for file in Path(spec.model).glob("*.safetensors"):
        weights |= load_file(file)
    module.model.load_state_dict(convert_state_from_hf(config, weights, model_type=config.model_type))
    return module


def main() -> None:
    """Train as the specification says."""
    spec = read_spec(sys.argv[1])
    prepare_training_environment(backend=None)
    log = StepLog(spec)
    callback = LogStep()
    callback.log = log
    module = build_train_module(spec)
    trainer = TrainerConfig(
        save_folder=spec.directory + "/out",
        device=spec.device,
        max_duration=Duration.steps(spec.max_steps),
        metrics_collect_interval=1,
        no_checkpoints=True,
        no_evals=True,
        callbacks={"steps": callback},
    ).build(module, Steps(spec, log))
    trainer.fit()


if __name__ == "__main__":
    main()
