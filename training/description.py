"""What a run prints at its start: model, data, how a step is computed, schedule, and warnings about it."""

import torch
from transformers import PretrainedConfig

from common.dtypes import dtype_name
from configs.config import Config
from data.dealing import Deal
from model.architectures import origin
from model.flops import PeakFlops
from model.language_model import num_parameters, num_trained
from training.balance import balance_line, balance_warnings, steps_looked_at
from training.inputs import Inputs


def describe_run(
    config: Config,
    inputs: Inputs,
    model: torch.nn.Module,
    layers: list[torch.nn.Module],
    model_config: PretrainedConfig,
    world_size: int,
    peak: PeakFlops,
    peak_flops: float,
) -> list[str]:
    """The lines at the start of a run. `peak_flops` is the sum over all ranks."""
    count, optimizer = num_parameters(model), config.optimizer
    layer_class = type(layers[0]).__name__.removeprefix("FSDP")  # the prefix that fully_shard adds
    lines = [f"model {config.model.path}: {_parameters(config, model)}; {len(layers)} x {layer_class}"]
    base = origin(config.model.path)
    lines += [f"base model: {base}"] if base else []
    lines += inputs.train.lines("train", inputs.plan.passes(inputs.total_steps))
    lines += inputs.plan.promises
    lines += inputs.validation.lines("validation") if inputs.validation else []
    dtype = "fp32" if peak.dtype == torch.float32 else "bf16"
    lines += [inputs.asked.cost_line(count, dtype)] if inputs.asked else []
    lines.append(_batch_line(config, inputs.deal(0), world_size))
    deals = [inputs.deal(step) for step in steps_looked_at(inputs)]
    lines += [balance_line(deals)] if world_size > 1 else []
    rope = config.model.rope_type or "as in config.json"
    reduced = f", gradients reduced in {config.sharding.reduce_dtype}" if config.sharding.reduce_dtype != "fp32" else ""
    lines.append(
        f"sharding {config.sharding.strategy}{' in host memory' if config.sharding.cpu_offload else ''}, compute "
        f"{dtype_name(peak.dtype)}{reduced}, optimizer memory {optimizer.memory}, "
        f"peak {peak_flops / 1e12:.2f} TFLOP/s ({peak.source}), "
        f"window {model_config.max_position_embeddings} positions, RoPE {rope}"
    )
    every = config.model.checkpoint_every
    lines.append(
        f"activation checkpointing {config.model.activation_checkpointing}"
        + (f", one layer in {every}" if every > 1 else "")
        + f"; compile {'on' if config.model.compile else 'off'}"
    )
    lines.append(
        f"schedule: {counted(inputs.total_steps, 'step')} ({inputs.plan.steps_per_epoch[0]} in the first epoch), warm-up "
        f"{counted(inputs.warmup_steps, 'step')}, peak learning rate {optimizer.learning_rate:g}, optimizer.min_lr_ratio "
        f"{optimizer.min_lr_ratio:g}"
    )
    warnings = schedule_warnings(config, count, inputs.total_steps, inputs.warmup_steps)
    if optimizer.max_steps and optimizer.max_steps > inputs.total_steps:
        warnings.append(
            f"optimizer.max_steps={optimizer.max_steps} has no effect, because optimizer.epochs={optimizer.epochs} has only "
            f"{inputs.total_steps} steps; raise optimizer.epochs to train longer"
        )
    warnings += balance_warnings(config, inputs, deals, world_size)
    return lines + [f"warning: {warning}" for warning in warnings]


def _parameters(config: Config, model: torch.nn.Module) -> str:
    """How many parameters the model has, and which of them are trained."""
    count, trained = num_parameters(model), num_trained(model)
    if not config.lora.rank:
        return f"{count:,} parameters, {'all' if trained == count else f'{trained:,}'} trained"
    lora = config.lora
    dropout = f", dropout {lora.dropout:g}" if lora.dropout else ""
    return (
        f"{count - trained:,} parameters frozen in {config.model.compute_dtype}, {trained:,} trained ({trained / count:.2%}: "
        f"LoRA on {lora.targets}, rank {lora.rank}, alpha {lora.effective_alpha:g}{dropout})"
    )


def memory_line(memory: str, measured: dict[str, float]) -> str:
    """The bytes per parameter that `optimizer.memory` promises beside the measured ones."""
    return (
        f"optimizer memory {memory}: {measured['total']:.2f} bytes per parameter measured (weights "
        f"{measured['weights']:.2f}, gradients {measured['gradients']:.2f}, moments {measured['moments']:.2f})"
    )


def schedule_warnings(config: Config, count: int, total_steps: int, warmup_steps: int) -> list[str]:
    """Warnings about a learning rate outside the usual range of its stage (above 1B parameters), or never reached."""
    rate, stage = config.optimizer.learning_rate, config.optimizer.stage
    warnings = []
    if count >= 1e9 and stage == "pre-training" and not config.lora.rank and rate > 1e-5:
        warnings.append(
            f"learning rate {rate:g} is above 1e-5, the usual maximum for continual pre-training: expect forgetting"
        )
    if count >= 1e9 and config.lora.rank and not 5e-5 <= rate <= 5e-4:
        warnings.append(f"learning rate {rate:g} is outside 5e-5 to 5e-4, the usual range for LoRA above 1B parameters")
    if count >= 1e9 and stage == "fine-tuning" and not config.lora.rank and not 1e-5 <= rate <= 5e-5:
        warnings.append(
            f"learning rate {rate:g} is outside 1e-5 to 5e-5, the usual range for full fine-tuning above 1B parameters"
        )
    if warmup_steps >= total_steps > 1:
        warnings.append(
            f"the warm-up of {warmup_steps} steps covers all {total_steps} steps: the peak learning rate is reached at the "
            "last step or never"
        )
    return warnings


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `2 batches`."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _batch_line(config: Config, first: Deal, world_size: int) -> str:
    """How a step is made up; `first`: the deal of the first step."""
    batch, data = config.batch, config.data
    examples = counted(batch.global_examples or 0, "example")
    if batch.global_tokens:
        examples = f"as many examples as fit into {counted(batch.global_tokens, 'target token')}"
    size = f"{counted(batch.rows * data.sequence_length, 'token')} at most"
    if not data.packing:
        size = f"{counted(batch.rows, 'example')} at most"
    if data.mix:
        examples += " and what is mixed in"
    return (
        f"step: {examples}; step 1 is dealt to {counted(world_size, 'rank')} x "
        f"{counted(len(first.items), 'micro-batch')} of {size}"
    )
