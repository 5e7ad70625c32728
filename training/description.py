"""The lines that a run prints at its start: model, data, steps, schedule and warnings. All details are in start.txt."""

import math
import re
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from common.durable_files import write_durably
from configs.config import Config
from configs.load import FORMATS
from data.dealing import balance
from data.examples import Documents
from distributed.process_group import read_on_first
from model.architectures import origin
from model.dtypes import dtype_name
from model.flops import Peak
from model.language_model import num_base_parameters, num_parameters, num_trained
from model.rope import trained_length, window
from training.auto import rate_warnings
from training.chat_settings import other_options
from training.inputs import Inputs

if TYPE_CHECKING:
    from training.start import TrainingRun


def describe_run(
    run: "TrainingRun",
    layers: list[torch.nn.Module],
    optimizer: torch.optim.Optimizer,
    peak: Peak,
    notes: list[str],
    disk: str,
) -> list[str]:
    """Return the lines that a run prints at its start: five, one for each warning, and `notes`. Every rank must call this.

    runs/NAME/start.txt gets all details, and with run.verbose they are printed as well. notes: on the resume. disk: the line of
    `check_disks`.
    """
    config, inputs, model, model_config, ranks = run.config, run.data, run.model, run.model_config, run.ranks
    world_size = ranks.world_size
    count, settings, sharding = num_parameters(model), config.optimizer, config.sharding
    layer_class = type(layers[0]).__name__.removeprefix("FSDP")  # the prefix that fully_shard adds
    base = origin(config.model.path)
    every = config.model.checkpoint_every
    share, uneven = balance_of_ranks(config, inputs, world_size) if world_size > 1 else ("", [])
    lines = [
        f"model {config.model.path}: {_parameters(config, model)}; {len(layers)} x {layer_class}"
        + (f"; it is {base}" if base else ""),
        _data_line(inputs),
        _batch_line(config, inputs, world_size) + share,
        f"schedule: {counted(inputs.total_steps, 'step')}, of which {inputs.warmup_steps} warm up to a learning rate of "
        f"{settings.peak * inputs.peak_share:g}{_short(inputs)}; "
        + (
            f"learning_rate() of train.py then lowers it to {settings.min_lr_ratio:g} of that"
            if inputs.warmup_steps < inputs.total_steps
            else "no step follows the warm-up, so the rate is not lowered"
        ),
        f"memory: sharding {sharding.strategy}{' in host memory' if sharding.cpu_offload else ''} keeps {settings.memory} "
        f"bytes for N parameters; compute in {dtype_name(peak.dtype)}, activation checkpointing "
        f"{config.model.activation_checkpointing}{f', one layer in {every}' if every > 1 else ''}, compile "
        f"{'on' if config.model.compile else 'off'}",
    ]
    remarks = inputs.train.lines("train", inputs.plan.passes(inputs.total_steps))
    remarks += inputs.validation.lines("validation") if inputs.validation else []
    details = [*remarks, *inputs.plan.warnings]
    for questions in filter(None, (inputs.questions, inputs.keep)):
        details.append(questions.cost_line(count, "fp32" if peak.dtype == torch.float32 else "bf16"))
    details.append(
        f"peak {peak.flops / 1e12:.2f} TFLOP/s ({peak.source}); gradients reduced in {sharding.reduce_dtype}; window "
        f"{window(model_config)} positions, RoPE {config.model.rope_type or 'as in config.json'}; "
        f"{counted(inputs.plan.steps_per_epoch[0], 'step')} in the first epoch"
    )
    warnings = schedule_warnings(config, num_base_parameters(model), inputs.total_steps, inputs.warmup_steps)
    peaks = list(dict.fromkeys(group["lr"] for group in optimizer.param_groups))
    if peaks != [settings.peak]:
        warnings.append(
            f"make_optimizer has groups with a peak rate of {', '.join(f'{rate:g}' for rate in peaks)}, and they are trained with it; "
            f"the curve train/learning_rate is that of optimizer.learning_rate={settings.peak:g}"
        )
    warnings += [*too_many_steps(config, inputs.total_steps, inputs.plan.steps_per_epoch[0]), *other_options(config)]
    if config.lora.rank and config.model.rope_type:
        warnings.append("peft cannot be told model.rope_type: use export/, where the adapter is merged, not adapter/")
    warnings += [
        f"{name}: its share holds over {steps} steps, because no example is cut, and the run has {inputs.total_steps}: shorten "
        "its examples, or make the steps or its share larger"
        for name, steps in zip(inputs.train.names[1:], inputs.plan.steps_of_shares, strict=True)
        if steps > inputs.total_steps
    ]
    warnings += [*uneven, *short_documents(config, inputs, model_config), *few_held_out(config, inputs)]
    lines += _odd(remarks) + [f"warning: {warning}" for warning in warnings] + notes
    details.append(disk)
    lines += run.model_lines
    path = run.directory / "start.txt"
    read_on_first(lambda: write_durably(path, "\n".join([*lines, *details, ""])), ranks)
    return lines + [line for line in details if config.run.verbose or line.startswith("warning: ")]


BALANCE_STEPS = 20  # over which the balance is measured
FEW_HELD_OUT = 10
BALANCED = 0.9  # a run warns below it
# Remarks on the data of every run: the form of the examples, where they were encoded, and how many are held out.
_ROUTINE = re.compile(
    rf"  .*: ({'|'.join(FORMATS)})( and \w+)* \(|  (from the cache|tokenised) |  [0-9,]+ examples? (not )?held out"
)


def _odd(remarks: list[str]) -> list[str]:
    """Return a warning for each remark on data that are left out, cut or doubtful, with the name of its source."""
    warnings, source = [], ""
    for line in remarks:
        if not line.startswith("  "):
            source = line.partition(":")[0].partition(" (")[0]
        elif not _ROUTINE.match(line):
            warnings.append(f"warning: {source}: {line.strip()}")
    return warnings


def _data_line(inputs: Inputs) -> str:
    """Return a line on the training data, the mixed-in sources and the validation data."""
    train, passes = inputs.train, inputs.plan.passes(inputs.total_steps)
    mixed = zip(train.names[1:], train.shares[1:], inputs.plan.steps_of_shares, passes[1:], strict=True)
    parts = [f"data: {train.sources[0].report.splitlines()[0]}"]
    parts += [
        f"{name} is {share:.1%} of the targets over any {counted(steps, 'step')}, to within a factor of two ({number:.2f} passes)"
        for name, share, steps, number in mixed
    ]
    if inputs.validation:
        parts.append(f"validation: {inputs.validation.sources[0].report.partition(',')[0]}")
    return "; ".join(parts)


def _parameters(config: Config, model: torch.nn.Module) -> str:
    """Return the number of parameters and of trained ones, in words."""
    count, trained = num_parameters(model), num_trained(model)
    if not config.lora.rank:
        return f"{count:,} parameters, {'all' if trained == count else f'{trained:,}'} trained"
    lora = config.lora
    dropout = f", dropout {lora.dropout:g}" if lora.dropout else ""
    return (
        f"{count - trained:,} parameters frozen in {config.model.compute_dtype}, {trained:,} trained ({trained / count:.2%}: "
        f"LoRA on {lora.targets}, rank {lora.rank}, alpha {lora.effective_alpha:g}{dropout})"
    )


def _short(inputs: Inputs) -> str:
    """Return a remark if the run is too short to reach optimizer.learning_rate."""
    if inputs.peak_share == 1:
        return ""
    return f", {inputs.peak_share:g} of optimizer.learning_rate, because the run is short (optimizer.warmup_steps=N reaches all of it)"


def balance_of_ranks(config: Config, inputs: Inputs, ranks: int) -> tuple[str, list[str]]:
    """Return the share of a step in which ranks wait for each other, in words, and warnings if it is large.

    It is measured over evenly spaced steps of the first epoch. An epoch's last step may be smaller and is left out.
    """
    last = min(inputs.total_steps, max(1, inputs.plan.steps_per_epoch[0] - 1))
    count = min(BALANCE_STEPS, last)
    computing = balance(inputs.deal(i * last // count) for i in range(count))
    share, warnings = f"the ranks wait for each other in {1 - computing:.0%} of", []
    if round(computing, 2) < BALANCED:
        key = "global_tokens" if config.batch.global_tokens else "global_examples"
        warnings.append(
            f"{share} a step, because its documents have different lengths and are few for {ranks} ranks; raise "
            f"batch.{key} or use fewer ranks"
        )
    return f"; {share} it", warnings


def schedule_warnings(config: Config, count: int, total_steps: int, warmup_steps: int) -> list[str]:
    """Return warnings about a learning rate that is far from the suggested one, or never reached. count: parameters of the base."""
    warnings = rate_warnings(config, count)
    if warmup_steps >= total_steps > 1:
        warnings.append(
            f"the warm-up of {warmup_steps} steps covers all {total_steps} steps: the peak learning rate is reached at the "
            "last step or never"
        )
    return warnings


def too_many_steps(config: Config, total_steps: int, steps_per_epoch: int) -> list[str]:
    """Return a sentence if optimizer.max_steps is larger than the number of steps."""
    max_steps, epochs = config.optimizer.max_steps, config.optimizer.epochs
    if max_steps is None or max_steps <= total_steps:
        return []
    only = f"optimizer.epochs={epochs} ends the run after {counted(total_steps, 'step')}"
    needed = math.ceil(max_steps / steps_per_epoch)
    return [f"{only}: optimizer.epochs={needed} lets optimizer.max_steps={max_steps} decide"]


def short_documents(config: Config, inputs: Inputs, model_config: PretrainedConfig) -> list[str]:
    """Return a warning if RoPE is scaled and no training document is longer than the window before."""
    window = trained_length(model_config) if config.model.rope_type else None
    documents = [source for source in inputs.train.sources if isinstance(source, Documents)]
    if window is None or len(documents) < len(inputs.train.sources):  # the lengths in a token store are unknown
        return []
    longest = max(int(source.lengths.max(initial=0)) for source in documents)
    if longest > window:
        return []
    return [
        f"model.rope_type={config.model.rope_type}: no training document is longer than the window before, {window} tokens; "
        f"the longest has {longest}, so nothing beyond it is learned"
    ]


def few_held_out(config: Config, inputs: Inputs) -> list[str]:
    """Return a warning if data.validation_share holds out fewer examples than FEW_HELD_OUT."""
    number = len(inputs.validation) if inputs.validation and config.data.validation_share else FEW_HELD_OUT
    if number >= FEW_HELD_OUT:
        return []
    return [f"{counted(number, 'example')} held out: their loss says little; data.validation_share=0 trains on all"]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 rank`, `2 ranks`, `2 batches`."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _batch_line(config: Config, inputs: Inputs, world_size: int) -> str:
    """Return a line on the size of a step."""
    batch, data, first = config.batch, config.data, inputs.deal(0)
    examples = counted(batch.global_examples or 0, "example")
    if not data.mix and len(items := inputs.plan.batch(0).items) < (batch.global_examples or 0):
        examples = f"{counted(len(items), 'example')} (a whole epoch; batch.global_examples={batch.global_examples})"
    if batch.global_tokens:
        examples = f"as many examples as fit into {counted(batch.global_tokens, 'target token')}"
    size = f"{counted(batch.rows * data.length, 'token')} at most"
    if not data.packing:
        size = f"{counted(batch.rows, 'example')} at most"
    if data.mix:
        examples += " and what is mixed in"
    context = config.sharding.context
    ranks = (
        f"{counted(world_size // context, 'group')} of {context} ranks" if context > 1 else counted(world_size, "rank")
    )
    return f"step: {examples}; step 1 is dealt to {ranks} x {counted(len(first.items), 'micro-batch')} of {size}"
