"""Full fine-tuning of a causal language model: one loop to read from top to bottom, and to edit.

    torchrun --nproc_per_node=8 train.py configs/xbrl.py
    torchrun --nproc_per_node=2 train.py configs/laptop.py optimizer.learning_rate=1e-4 run.name=trial
    python train.py configs/laptop.py

All weights are trained. Parameters, gradients and optimizer state are sharded over the ranks (FSDP2). configs/config.py
has all settings of a run. A run writes to runs/<name>/; started again, it continues from its last checkpoint.
"""
# torch's stubs do not declare AdamW's found_inf and grad_scale.
# pyright: reportAttributeAccessIssue=false

import gc
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.dtypes import DTYPES, has_native_bf16
from common.errors import UserError, run_script
from configs.config import as_dict
from configs.loading.checks import check_world
from configs.loading.command_line import config_from_command_line
from data.batches import MicroBatch, Plan, collate, micro_batches, prefetch
from data.sources import MAIN, Corpus, mean_losses
from data.tokens import load_tokenizer
from distributed.checkpoint import load_checkpoint, save_checkpoint, update_state
from distributed.gradients import bytes_per_parameter, gradient_norm
from distributed.optimizer import check_memory, make_optimizer, parameter_dtype
from distributed.process_group import (
    StopSignal,
    agree_any,
    process_group,
    read_on_first,
    world_size_from_environment,
)
from distributed.sharding import before_micro_batch, decoder_layers, evaluating, make_mesh, parallelize, reshard
from eval.forgetting import measure_forgetting, start_forgetting
from model.architectures import check_model_directory, read_model_config
from model.ewc.start import start_penalty
from model.flops import PeakFlops, count_work
from model.language_model import build_on_meta, load_weights, parameter_names
from model.loss import LossSums
from model.rope import check_length
from model.vocabulary.rows import first_new_row
from training.description import describe_run, memory_line
from training.ending import export_run
from training.inputs import read_inputs
from training.meter import Meter
from training.progress import BadSteps, find_progress, step_meaning
from training.run_log import RunLog, write_provenance

STOP_AFTER_BAD_STEPS = 5  # in a row, with a loss or gradient norm that is not finite
COLLECT_GARBAGE_EVERY = 50  # steps


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, min_ratio: float) -> float:
    """Learning rate at 0-based `step`: linear warm-up, then cosine decay to `min_ratio * peak` at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def validate(
    model: torch.nn.Module, plan: Plan, corpus: Corpus, micro_batch: int, stop: StopSignal
) -> dict[str, float] | None:
    """Mean loss in nats per target token, for each source. A collective. None after a signal."""
    ranks = stop.ranks
    loss_sums = LossSums(len(corpus.sources), ranks.device)
    targets = np.zeros(len(corpus.sources), dtype=np.int64)
    with evaluating(model):
        for batch in map(plan.batch, range(plan.num_steps)):
            targets += batch.targets_by_source
            for items in micro_batches(batch.rows, corpus, ranks.rank, ranks.world_size, micro_batch):
                if stop.agreed():  # the same on every rank
                    return None
                loss_sums.total.add_(model(collate(items, corpus).to(ranks.device), loss_sums))
    dist.all_reduce(loss_sums.values)
    means = mean_losses(corpus, loss_sums.by_source.tolist(), targets)
    return {"validation/loss" + (f"/{name}" if name != MAIN else ""): loss for name, loss in means.items()}


def main() -> int:
    """One run, from its config to the exported model."""
    with ExitStack() as at_end:  # ends the process group, whatever happens
        return run(at_end)


def run(at_end: ExitStack) -> int:
    # --- 1. Config, model shape, data, plan: before a process group, so that a mistake ends in one sentence -----------
    is_first = int(os.environ.get("RANK", 0)) == 0
    world_size, ranks_per_node = world_size_from_environment()
    config = config_from_command_line(__doc__, world_size, print if is_first else lambda text: None)
    check_world(config, world_size, ranks_per_node)
    check_memory(config.optimizer.memory)
    run_directory = Path(config.run.directory) / config.run.name
    checkpoints, export_directory = run_directory / "checkpoints", run_directory / "export"
    if config.run.resume == "never" and run_directory.exists():
        raise UserError(f"{run_directory} exists and run.resume=never; choose another run.name or remove it")
    check_model_directory(config.model.path, "model.path")
    model_config = read_model_config(
        config.model.path, config.model.rope_type, config.model.rope_factor, config.model.rope_original_length
    )
    model = build_on_meta(model_config).to(parameter_dtype(config.optimizer.memory))  # shapes without memory
    layers = decoder_layers(model, config.model.layer_class)
    tokenizer = load_tokenizer(config.model.path)
    check_length(config.data.sequence_length, model_config, config.model.path)
    inputs = read_inputs(config, tokenizer, model_config.vocab_size, show_progress=is_first)
    plan, train, total_steps = inputs.plan, inputs.train, inputs.total_steps

    # --- 2. Processes, and where the run stands -----------------------------------------------------------------------
    ranks = at_end.enter_context(process_group(config.run.timeout_minutes))
    stop = StopSignal(ranks)
    torch.manual_seed(config.run.seed + ranks.rank)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    meaning = step_meaning(config, inputs, model_config)
    progress, resume_from = find_progress(checkpoints, meaning, len(train.sources), total_steps, ranks)
    log = RunLog(run_directory, ranks.rank, progress.step, total_steps)
    if ranks.rank == 0:
        record = write_provenance(run_directory, as_dict(config))
        log.say(f"run {run_directory}, commit {record['git_commit'][:12]}, torch {torch.__version__}")
    if read_on_first(lambda: progress.step == total_steps and export_directory.is_dir(), ranks):
        log.say(f"already finished: {total_steps} steps, exported to {export_directory}; nothing to do")
        log.close()
        return 0

    # --- 3. Model. The order matters: meta (above) -> checkpointing -> compile -> shard -> load this rank's slices ----
    compute_dtype = DTYPES[config.model.compute_dtype]
    if compute_dtype == torch.bfloat16 and agree_any(not has_native_bf16(ranks.device), ranks):
        compute_dtype = torch.float32
        log.say("not every rank has native bf16: all ranks compute in fp32 instead")
    peak = PeakFlops(ranks.device, compute_dtype)
    peak.measure(ranks)
    mesh = make_mesh(ranks.device.type, ranks_per_node, ranks.world_size, config.sharding)
    parallelize(model, layers, model.extra_fsdp_units(), mesh, compute_dtype, config.model, config.sharding)
    parameter_device = torch.device("cpu") if config.sharding.cpu_offload else ranks.device
    load_weights(model, config.model.path, parameter_device, ranks.device)
    model.train()
    peak.measure(ranks)
    # What follows needs the base's weights. A signal ends it early; the loop then takes no step.
    evaluations = {}
    validation, validation_plan = inputs.validation, inputs.validation_plan
    if validation and validation_plan:
        evaluations["validation"] = lambda: validate(model, validation_plan, validation, config.batch.micro_batch, stop)
    new_row = first_new_row(config.model.path)
    if config.run.eval_general:
        base = start_forgetting(
            model, tokenizer, config.data.sequence_length, config.batch.micro_batch, stop, shared_tokens=new_row
        )
        log.say(base.line())
        evaluations["forgetting"] = lambda: measure_forgetting(base, model, stop)
    ewc = None
    if config.ewc.strength:
        strategy, directory = config.sharding.strategy, run_directory / "ewc"
        ewc = start_penalty(model, config.ewc, directory, inputs.fisher_batches, strategy, stop, log.say, new_row)
    parameters = parameter_names(model)
    optimizer = make_optimizer(parameters, config.optimizer, config.run.seed)
    if resume_from:
        load_checkpoint(resume_from, parameters, optimizer, ranks)
    peak.measure(ranks)
    peak_flops = peak.over_all_ranks(ranks)
    for line in describe_run(config, inputs, model, layers, model_config, peak, peak_flops, ranks.world_size):
        log.say(line)
    if resume_from:
        log.say(f"resumed from {resume_from}")

    # --- 4. The loop. What is due after a step is done before the next one starts -------------------------------------
    def micro_batches_from(first_step: int) -> Iterator[tuple[MicroBatch, bool]]:
        """Yields (micro_batch, is_last_in_step); every rank gets the same number."""
        for batch in map(plan.batch, range(first_step, total_steps)):
            if batch.num_target_tokens:
                dealt = micro_batches(batch.rows, train, ranks.rank, ranks.world_size, config.batch.micro_batch)
                for i, items in enumerate(dealt, 1):
                    yield collate(items, train), i == len(dealt)

    # One iterator over all steps to come; a thread prepares micro-batches while the device computes.
    upcoming = prefetch(micro_batches_from(progress.step))
    # Python's garbage collector would pause one rank at a time, and the others would wait: collect at the same steps.
    gc.collect()
    gc.freeze()
    gc.disable()
    bad_steps = BadSteps(progress, STOP_AFTER_BAD_STEPS, ranks.device)
    meter = Meter(train, count_work(model, model_config), peak_flops, ranks.device)
    peak_rate, min_lr_ratio = config.optimizer.learning_rate, config.optimizer.min_lr_ratio
    saved_step = progress.step
    stopping = memory_measured = False
    while True:
        with meter.paused():
            improved = False
            for name, evaluate in evaluations.items():
                if not stopping and progress.is_due(name, config.run.eval_every, total_steps):
                    figures = evaluate()
                    if figures is not None:  # not cut short by a signal
                        is_best = progress.finish_evaluation(name, figures)
                        improved |= is_best
                        log.evaluation(progress.step, total_steps, figures, is_best)
                        if 0 < progress.step == saved_step:
                            update_state(checkpoints, progress.as_json(), ranks, is_best)
            stopping = stopping or stop.agreed()
            finished = progress.step == total_steps
            periodic = config.run.save_every and progress.step % config.run.save_every == 0
            if (finished or stopping or improved or periodic) and progress.step > saved_step:
                bad_steps.update(progress)
                state = progress.as_json()
                with stop.saving():
                    save_checkpoint(checkpoints, state, parameters, optimizer, ranks, config.run.keep_last, improved)
                saved_step = progress.step
        if stopping or finished:
            break

        ranks.watch.at(f"step {progress.step + 1}")
        # ---- one optimizer step --------------------------------------------------------------------------------------
        batch = plan.batch(progress.step)
        num_targets = batch.num_target_tokens
        if num_targets == 0:  # every rank knows it from the plan; weight decay alone would change the weights
            progress.step += 1
            log.advance(progress.step)
            log.say(f"step {progress.step}/{total_steps} | has no target token and is not taken")
            continue
        is_logged = (progress.step + 1) % config.run.log_every == 0 or progress.step + 1 == total_steps
        rate = learning_rate(progress.step, total_steps, inputs.warmup_steps, peak_rate, min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"], group["noise_step"] = rate, progress.step
        loss_sums = LossSums(len(train.sources), ranks.device)
        for micro_batch, is_last in upcoming:  # the same number on every rank
            stopping = stop.agreed()
            if stopping:
                break
            before_micro_batch(model, config.sharding.strategy, is_last)
            loss_sum = model(micro_batch.to(ranks.device), loss_sums)  # adds to the sums by source, not to the total
            # Divided once, by the target tokens of the whole step. FSDP sums over ranks and does not average.
            (loss_sum / num_targets).backward()
            loss_sums.total.add_(loss_sum.detach())
            if is_last:
                break
        if stopping:  # discard the unfinished step: what is saved is the state after the last finished one
            optimizer.zero_grad()
            reshard(model)
            continue
        dist.all_reduce(loss_sums.values)
        if ewc:
            ewc.add_gradient(progress.step, measure=is_logged)
        grad_norm = gradient_norm(parameters.values()).to(ranks.device)
        # The same on every rank, because both are sums over all ranks. AdamW reads it on the device and skips the step.
        bad = ~(torch.isfinite(loss_sums.total) & torch.isfinite(grad_norm))
        optimizer.found_inf = bad.float().to(parameter_device)
        # Clipping: AdamW divides the gradients by this as it reads them.
        optimizer.grad_scale = (grad_norm / config.optimizer.max_grad_norm).clamp(min=1.0).to(parameter_device)
        optimizer.step()
        if not memory_measured:
            memory_measured = True
            log.say(memory_line(config.optimizer.memory, bytes_per_parameter(parameters, optimizer)))
        optimizer.zero_grad()
        # --------------------------------------------------------------------------------------------------------------

        bad_steps.add(bad)
        progress.finish_step(batch)
        meter.add(batch, loss_sums)
        log.advance(progress.step)
        if progress.step % COLLECT_GARBAGE_EVERY == 0:
            gc.collect(1)
        if is_logged:
            row = {  # here the host waits for the device
                "train/loss": loss_sums.total.item() / num_targets,
                "train/grad_norm": grad_norm.item(),
                "train/learning_rate": rate,
            }
            too_many_bad_steps = bad_steps.update(progress)
            row |= meter.row(progress, plan.passes(progress.step)[0])
            row |= ewc.curves(meter.seconds_per_step) if ewc else {}
            log.row(progress.step, row)
            log.say(meter.line(row, progress.step, total_steps))
            if too_many_bad_steps:
                log.close()
                last = checkpoints / f"step-{saved_step:06d}" if saved_step else "none yet: the base model"
                raise UserError(
                    f"loss or gradient norm was not finite in {STOP_AFTER_BAD_STEPS} steps in a row, up to step "
                    f"{progress.step}; the last checkpoint ({last}) is good: lower optimizer.learning_rate, or check the data "
                    "of these steps"
                )

    # --- 5. The end: stopped by a signal, or finished and exported ----------------------------------------------------
    if stopping:
        saved = ", saved" if saved_step else ""
        log.say(
            f"{stop.name or 'signal'}: stopped after step {progress.step}/{total_steps}{saved}; start again to continue"
        )
    else:
        export_run(config, checkpoints, export_directory, parameters, model_config, tokenizer, ranks)
        log.say(f"exported to {export_directory}; curves: tensorboard --logdir {run_directory / 'tensorboard'}")
    log.close()
    return 0


if __name__ == "__main__":
    run_script(main)
