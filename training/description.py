"""What a run prints at its start: model, data, how a step is computed, schedule, and warnings about it."""

import torch
from transformers import PretrainedConfig

from common.dtypes import dtype_name
from configs.config import Config
from data.batches import TrainingPlan
from model.download import origin
from model.flops import PeakFlops
from model.language_model import num_parameters
from training.inputs import Inputs


def describe_run(
    config: Config,
    inputs: Inputs,
    model: torch.nn.Module,
    layers: list[torch.nn.Module],
    model_config: PretrainedConfig,
    peak: PeakFlops,
    peak_flops: float,
    world_size: int,
) -> list[str]:
    """The lines at the start of a run. `peak_flops` is the sum over all ranks."""
    count, optimizer = num_parameters(model), config.optimizer
    layer_class = type(layers[0]).__name__.removeprefix("FSDP")  # the prefix that fully_shard adds
    lines = [f"model {config.model.path}: {count:,} parameters, all trained; {len(layers)} x {layer_class}"]
    base = origin(config.model.path)
    lines += [f"base model: {base}"] if base else []
    lines += inputs.train.lines("train", inputs.plan.passes(inputs.total_steps))
    lines += inputs.plan.promises
    lines += inputs.validation.lines("validation") if inputs.validation else []
    rows = rows_of_steps(inputs.plan, inputs.total_steps)
    lines.append(_batch_line(config, len(inputs.plan.batch(0).rows), world_size))
    rope = config.model.rope_type or "as in config.json"
    lines.append(
        f"sharding {config.sharding.strategy}{' in host memory' if config.sharding.cpu_offload else ''}, compute "
        f"{dtype_name(peak.dtype)}, optimizer memory {optimizer.memory}, peak {peak_flops / 1e12:.2f} TFLOP/s "
        f"({peak.source}), window {model_config.max_position_embeddings} positions, RoPE {rope}"
    )
    every = config.model.checkpoint_every
    lines.append(
        f"activation checkpointing {config.model.activation_checkpointing}"
        + (f", one layer in {every}" if every > 1 else "")
        + f"; compile {'on' if config.model.compile else 'off'}"
    )
    lines.append(
        f"schedule: {counted(inputs.total_steps, 'step')} ({inputs.plan.steps_per_epoch[0]} in the first epoch), warm-up "
        f"{counted(inputs.warmup_steps, 'step')}, peak learning rate {optimizer.learning_rate:g}, cosine to "
        f"{optimizer.min_lr_ratio:g} of the peak"
    )
    warnings = schedule_warnings(config, count, inputs.total_steps, inputs.warmup_steps)
    if optimizer.max_steps and optimizer.max_steps > inputs.total_steps:
        warnings.append(
            f"optimizer.max_steps={optimizer.max_steps} has no effect, because optimizer.epochs={optimizer.epochs} has only "
            f"{inputs.total_steps} steps; raise optimizer.epochs to train longer"
        )
    warnings += idle_warnings(config, rows, world_size)
    return lines + [f"warning: {warning}" for warning in warnings]


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
    if count >= 1e9 and stage == "pre-training" and rate > 1e-5:
        warnings.append(
            f"learning rate {rate:g} is above 1e-5, the usual maximum for continual pre-training: expect forgetting"
        )
    if count >= 1e9 and stage == "fine-tuning" and not 1e-5 <= rate <= 5e-5:
        warnings.append(
            f"learning rate {rate:g} is outside 1e-5 to 5e-5, the usual range for full fine-tuning above 1B parameters"
        )
    if warmup_steps >= total_steps > 1:
        warnings.append(
            f"the warm-up of {warmup_steps} steps covers all {total_steps} steps: the peak learning rate is reached at the "
            "last step or never"
        )
    return warnings


def rows_of_steps(plan: TrainingPlan, total_steps: int, at_most: int = 20) -> list[int]:
    """Packed rows of up to `at_most` steps, evenly spaced over the run.

    The last step of an epoch may be smaller and is left out, unless it is the only one of its epoch.
    """
    ends = {sum(plan.steps_per_epoch[: epoch + 1]) - 1 for epoch, steps in enumerate(plan.steps_per_epoch) if steps > 1}
    count = min(at_most, total_steps)
    steps = {i * total_steps // count for i in range(count)}
    # The step before a left-out one stands for it; it is of the same epoch.
    return [len(plan.batch(step).rows) for step in sorted({step - (step in ends) for step in steps})]


def idle_warnings(config: Config, rows: list[int], world_size: int) -> list[str]:
    """A warning if steps have fewer packed rows than there are ranks. `rows`: of some steps (`rows_of_steps`)."""
    short = [count for count in rows if count < world_size]
    if not short:
        return []
    idle, fewest, most = world_size - min(short), min(rows), max(rows)
    packed = counted(fewest, "packed row") if fewest == most else f"{fewest} to {most} packed rows"
    where = "in every step" if len(short) == len(rows) else f"in {len(short)} of {len(rows)} steps looked at"
    up_to = "" if fewest == most else "up to "
    size = "batch.global_tokens" if config.batch.global_tokens else "batch.global_examples"
    return [
        f"the steps have {packed} for {counted(world_size, 'rank')}: {up_to}{counted(idle, 'rank')} "
        f"{'is' if idle == 1 else 'are'} idle {where}; raise {size}, lower data.sequence_length or use fewer ranks"
    ]


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _batch_line(config: Config, rows: int, world_size: int) -> str:
    """How a step is made up; `rows`: packed rows of the first step."""
    batch = config.batch
    examples = counted(batch.global_examples or 0, "example")
    if batch.global_tokens:
        examples = f"as many examples as fit into {counted(batch.global_tokens, 'target token')}"
    return (
        f"step: {examples}; the first is packed into {counted(rows, 'row')} of {config.data.sequence_length} tokens, on "
        f"{counted(world_size, 'rank')} x micro-batches of {counted(batch.micro_batch, 'row')}: accumulation "
        f"{-(-rows // (world_size * batch.micro_batch))}"
    )
