"""Full fine-tuning of a causal language model: one loop to read from top to bottom, and to edit.

    torchrun --nproc_per_node=8 train.py configs/xbrl.py
    torchrun --nproc_per_node=2 train.py configs/quickstart.py optimizer.learning_rate=1e-4 run.name=trial
    python train.py configs/quickstart.py
    python train.py configs/quickstart.py --dry-run    # print the plan, its memory and its time, and end
    python train.py configs/quickstart.py --check      # prove the run before it is paid for (docs/check.md)

All weights are trained. Parameters, gradients and optimizer state are sharded over the ranks (FSDP2). configs/config.py
has all settings of a run. A run writes to runs/<name>/; started again, it continues from its last checkpoint.
"""

import os
import sys
from pathlib import Path

# Another program answers these, in place of this one, before anything heavy is imported.
INSTEAD = {"--dry-run": ("plan.py", "--here"), "--check": ("check.py", "--train", __file__)}
if __name__ == "__main__":
    for option in [option for option in INSTEAD if option in sys.argv[1:]]:
        script, *options = INSTEAD[option]
        others = [argument for argument in sys.argv[1:] if argument != option]
        path = Path(__file__).resolve().parent / "scripts" / script
        os.execv(sys.executable, [sys.executable, str(path), *options, *others])

from common.lean_imports import begin_imports, end_imports

begin_imports()
import gc
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import run_script
from configs.config import Config, Optimizer, as_dict
from configs.loading.checks import check_world
from configs.loading.command_line import read_command_line
from data.batches import MicroBatch, Plan, collate, prefetch
from data.dealing import Dealer
from data.sources import MAIN, Corpus, mean_losses
from data.tokens import load_tokenizer
from distributed.checkpoint import allocate_state, load_checkpoint
from distributed.gradients import bytes_per_parameter, clip_gradients, gradient_norm
from distributed.host_memory import keep_freed_memory
from distributed.optimizer import adamw, check_format, check_memory
from distributed.process_group import Ranks, StopSignal, device_line, process_group, world_size_from_environment
from distributed.saver import Saver
from distributed.sharding import before_micro_batch, decoder_layers, evaluating, make_mesh, parallelize, reshard
from eval.forgetting import measure_forgetting, start_forgetting
from model.architectures import check_model_directory, read_model_config
from model.ewc.start import start_penalty
from model.flops import PeakFlops, count_work, document_costs
from model.language_model import (
    PackedLanguageModel,
    check_weights,
    materialize,
    parameter_names,
    read_weights,
    trained_parameters,
)
from model.lora import build_to_train, init_adapters
from model.loss import LossSums, chunked
from model.rope import check_length
from model.vocabulary.rows import first_new_row
from training.answers import Answers, start_answers
from training.best import judge_best_again
from training.chat_settings import settle_chat_settings
from training.description import describe_run, memory_line
from training.ending import check_last_weights, export_run, is_finished, stop_for_bad_weights
from training.identity import hash_files
from training.inputs import Inputs, read_inputs
from training.meter import Meter
from training.micro_batch import settle_micro_batch
from training.owner import own_directory
from training.progress import Progress, find_progress
from training.provenance import record_start, short_commit
from training.run_log import RunLog
from training.save_timer import SaveTimer
from training.sinks import check_sinks
from training.skipped_steps import is_spike
from training.start import agree_on_dtype, agree_on_start, check_disks
from training.start_times import StartTimes

end_imports()

STOP_AFTER_BAD_STEPS = 5  # in a row, with a loss or gradient norm that is not finite
COLLECT_GARBAGE_EVERY = 50  # steps


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, min_ratio: float) -> float:
    """Learning rate at 0-based `step`: linear warm-up, then cosine decay to `min_ratio * peak` at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each target token: logits fp32 `(targets, vocabulary)`, targets `(targets,)` -> fp32 `(targets,)`.

    Any differentiable function. The loop adds the losses up and divides them once by the number of targets of the step.
    """
    return F.cross_entropy(logits, targets, reduction="none")


def make_optimizer(parameters: dict[str, torch.nn.Parameter], settings: Optimizer, seed: int) -> torch.optim.Optimizer:
    """The optimizer of `parameters`, which are this rank's shards by name. Any optimizer of torch can stand here.

    The loop sets `lr` in its groups before every step. AdamW here takes 16 to 6 bytes per parameter (optimizer.memory).
    """
    return adamw(parameters, settings, seed)


def validate(
    model: PackedLanguageModel,
    plan: Plan,
    corpus: Corpus,
    dealer: Dealer,
    stop: StopSignal,
    answers: Answers | None = None,
) -> dict[str, float] | None:
    """Mean loss in nats per target token of each source, and the scores of `answers`. A collective. None after a signal."""
    ranks = stop.ranks
    loss_sums = LossSums(len(corpus.sources), ranks.device)
    targets = np.zeros(len(corpus.sources))  # sums of weights
    with evaluating(model):
        for batch in map(plan.batch, range(plan.num_steps)):
            targets += batch.targets_by_source
            for items in dealer.deal(batch.items, corpus, ranks.world_size).of_rank(ranks.rank):
                if stop.agreed():  # the same on every rank
                    return None
                micro_batch = collate(items, corpus).to(ranks.device)
                loss_sums.total.add_(chunked(model.head, model(micro_batch), micro_batch, token_losses, loss_sums))
    dist.all_reduce(loss_sums.values)
    means = mean_losses(corpus, loss_sums.by_source.tolist(), targets)
    figures = {"validation/loss" + (f"/{name}" if name != MAIN else ""): loss for name, loss in means.items()}
    return answers.added_to(figures) if answers else figures


def main() -> int:
    """One run, from its config to the exported model."""
    # --- 1. Config, model shape, data, plan: before a process group, so that a mistake ends in one sentence -----------
    start = StartTimes()
    keep_freed_memory()  # before tokenising starts threads
    world_size, ranks_per_node = world_size_from_environment()
    is_first = int(os.environ.get("RANK", 0)) == 0
    say = print if is_first else lambda text: None
    command = read_command_line(__doc__, world_size, say)
    check_sinks(command.config.run.log_to if is_first else ())
    config = command.config
    check_world(config, world_size, ranks_per_node)
    check_memory(config.optimizer.memory)
    run_directory = Path(config.run.directory) / config.run.name
    check_model_directory(config.model.path, "model.path")
    model_config = read_model_config(
        config.model.path, config.model.rope_type, config.model.rope_factor, config.model.rope_original_length
    )
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    check_length(config.data.sequence_length, model_config, config.model.path)
    model = build_to_train(config, model_config)  # on meta: shapes without memory
    decoder_layers(model, config.model.layer_class)  # a wrong name ends here
    check_weights(model, config.model.path)
    config = settle_chat_settings(config, tokenizer, run_directory, world_size)
    config = settle_micro_batch(config, model, model_config, run_directory, world_size, say)
    start.lap("config and tokenizer")
    files = hash_files(config, __file__, say)
    costs = document_costs(count_work(model, model_config))
    inputs = read_inputs(config, tokenizer, model_config.vocab_size, costs, world_size, show_progress=is_first)
    start.lap("data")
    # Processes, which agree on all of this before anything is trained. A run directory has one owner.
    with process_group(config.run.timeout_minutes) as ranks:
        fresh = agree_on_start(config, inputs, model_config, tokenizer, files, ranks)
        with own_directory(run_directory, ranks):
            return train(config, inputs, model, model_config, tokenizer, fresh, ranks, start)


def train(
    config: Config,
    inputs: Inputs,
    model: PackedLanguageModel,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    fresh: Progress,
    ranks: Ranks,
    start: StartTimes,
) -> int:
    """Continue a run from its last checkpoint, or start it as `fresh`. Returns the exit code. Every rank runs this."""
    # --- 2. Where the run stands --------------------------------------------------------------------------------------
    run_directory = Path(config.run.directory) / config.run.name
    checkpoints, export_directory = run_directory / "checkpoints", run_directory / "export"
    plan, corpus, total_steps = inputs.plan, inputs.train, inputs.total_steps
    stop = StopSignal(ranks)
    torch.manual_seed(config.run.seed + ranks.rank)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # with warn_only, attention's backward on CUDA would only warn
    progress, resume_from, found = find_progress(checkpoints, fresh, config.run.resume, total_steps, ranks)
    if is_finished(config, progress, fresh, model_config, export_directory, total_steps, ranks):
        return 0
    settings, log_to = as_dict(config), config.run.log_to
    log = RunLog(run_directory, ranks, progress.step, progress.evaluated, total_steps, log_to, settings)
    record = record_start(run_directory, settings, progress.step, fresh.identity, ranks)
    device = device_line(ranks)  # a collective
    log.say(f"run {run_directory}, commit {short_commit(record)}, torch {torch.__version__}, {device}")
    start.lap("processes")

    # --- 3. Model. The order matters: meta (above) -> checkpointing -> compile -> shard -> load this rank's slices ----
    compute_dtype = agree_on_dtype(config.model.compute_dtype, ranks, log.say)
    ranks.watch.at("the loading of the model")
    peak = PeakFlops(ranks.device, compute_dtype)
    peak.measure(ranks)
    layers = decoder_layers(model, config.model.layer_class)
    mesh = make_mesh(ranks.device.type, world_size_from_environment()[1], ranks.world_size, config.sharding)
    strategy = parallelize(model, layers, model.extra_fsdp_units(), mesh, compute_dtype, config.model, config.sharding)
    parameter_device = torch.device("cpu") if config.sharding.cpu_offload else ranks.device
    materialize(model, config.model.path, parameter_device, ranks.device)
    # A resume reads the base's weights only where something is measured against them, or beside them (LoRA).
    is_partly_frozen = len(trained_parameters(model)) < len(parameter_names(model))
    if resume_from is None or config.run.eval_general or config.ewc.strength or config.lora.rank or is_partly_frozen:
        read_weights(model, config.model.path)
        init_adapters(trained_parameters(model), config.run.seed)  # no-op without LoRA
    model.train()
    peak.measure(ranks)
    start.lap("model")
    # What follows may need the base's weights. A signal ends it early; the loop then takes no step.
    evaluations = {}
    validation, validation_plan = inputs.validation, inputs.validation_plan
    answers = start_answers(config, inputs.asked, model, model_config, compute_dtype, tokenizer, stop, log.say)
    if validation and validation_plan:
        evaluations["validation"] = lambda: validate(model, validation_plan, validation, inputs.dealer, stop, answers)
    new_row = first_new_row(config.model.path)
    if config.run.eval_general:
        base = start_forgetting(model, tokenizer, inputs.dealer, stop, shared_tokens=new_row)
        log.say(base.line())
        evaluations["forgetting"] = lambda: measure_forgetting(base, model, stop)
    ewc = None
    if config.ewc.strength:
        fisher = inputs.fisher_batches
        ewc = start_penalty(model, config.ewc, run_directory / "ewc", fisher, strategy, stop, log.say, new_row)
    start.lap("evaluations")
    parameters = trained_parameters(model)
    optimizer = make_optimizer(parameters, config.optimizer, config.run.seed)
    check_format(optimizer, config.optimizer.memory)
    allocate_state(model.causal_lm, optimizer)
    registered = {}

    def register(name: str, thing: Any) -> None:
        """Keep in every checkpoint what else has a `state_dict()` of tensors, such as an average of the weights."""
        registered[name] = thing

    if resume_from:
        found += judge_best_again(progress, fresh, checkpoints, parameters, evaluations, ranks)
        load_checkpoint(resume_from, parameters, optimizer, ranks, registered)
    ranks.watch.at("the last preparations")
    peak.measure(ranks)
    peak_flops = peak.over_all_ranks(ranks)
    lines = describe_run(config, inputs, model, layers, model_config, ranks.world_size, peak, peak_flops)
    lines += check_disks(config, model, optimizer, model_config, ranks) + found
    for line in lines + [f"resumed from {resume_from}"] * bool(resume_from):
        log.say(line)
    start.lap("model")

    # --- 4. The loop. What is due after a step is done before the next one starts -------------------------------------
    def micro_batches_from(first_step: int) -> Iterator[tuple[MicroBatch, bool]]:
        """Yields (micro_batch, is_last_in_step); every rank gets the same number."""
        for deal in map(inputs.deal, range(first_step, total_steps)):
            dealt = deal.of_rank(ranks.rank)
            for i, items in enumerate(dealt, 1):
                yield collate(items, corpus), i == len(dealt)

    # One iterator over all steps to come; a thread prepares micro-batches while the device computes.
    upcoming = prefetch(micro_batches_from(progress.step))
    # Python's garbage collector would pause one rank at a time, and the others would wait: collect at the same steps.
    gc.collect()
    gc.freeze()
    gc.disable()
    saver = Saver(checkpoints, config.run.keep_last, config.run.async_save, config.run.timeout_minutes, ranks)
    timer = SaveTimer(config.run.save_minutes, ranks)
    meter = Meter(corpus, count_work(model, model_config), peak_flops, ranks.device)
    peak_rate, min_lr_ratio = config.optimizer.learning_rate, config.optimizer.min_lr_ratio
    stopping = too_many_bad_steps = False
    while True:
        with meter.paused():
            improved = False
            for name, evaluate in evaluations.items():
                if not (stopping or too_many_bad_steps) and progress.is_due(name, config.run.eval_every, total_steps):
                    ranks.watch.at(f"{name} after step {progress.step}")
                    figures = evaluate()
                    if figures is not None:  # not cut short by a signal
                        is_best = progress.finish_evaluation(name, figures)
                        improved |= is_best
                        log.evaluation(progress.step, total_steps, figures, is_best)
                        if 0 < progress.step == progress.saved_step:
                            log.sync()
                            saver.update_state(progress.as_json())
            stopping = stopping or stop.agreed()
            finished = progress.is_finished(total_steps, config.run.stop_after_no_gain)
            if finished and not (stopping or too_many_bad_steps):
                stopping = not check_last_weights(
                    progress, plan, saver, lambda last: validate(model, last, corpus, inputs.dealer, stop)
                )
            is_due = finished or stopping or improved or progress.is_save_due(config.run.save_every) or timer.is_due()
            if is_due and progress.step > progress.saved_step:
                # After a step that was not finite the weights may be bad: they are saved when a step is good again.
                is_checked = finished and not (stopping or too_many_bad_steps)
                if is_checked or improved or not progress.bad_steps_in_a_row:
                    ranks.watch.at(f"the save of step {progress.step}")
                    log.sync()  # the rows of a saved step are durable
                    with stop.saving():
                        timer.restart()
                        saver.save(progress.finish_save(fresh.identity), parameters, optimizer, registered)
            for times in saver.poll():
                log.save(times)
        if too_many_bad_steps:
            what = f"loss or gradient norm was not finite in {STOP_AFTER_BAD_STEPS} steps in a row, up to step {progress.step}"
            stop_for_bad_weights(what, progress, saver)
        if stopping or finished:
            break
        start.lap("evaluations")  # before the first step of this start; no-op from then on

        # ---- one optimizer step --------------------------------------------------------------------------------------
        batch = plan.batch(progress.step)
        num_targets = batch.num_target_tokens  # with weights, their sum
        is_logged = (progress.step + 1) % config.run.log_every == 0 or progress.step + 1 == total_steps
        ranks.watch.at(f"step {progress.step + 1}")
        rate = learning_rate(progress.step, total_steps, inputs.warmup_steps, peak_rate, min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"], group["noise_step"] = rate, progress.step  # the step selects the noise of bf16 rounding
        loss_sums = LossSums(len(corpus.sources), ranks.device)
        for micro_batch, is_last in upcoming:  # the same number on every rank
            stopping = stop.agreed()
            if stopping:
                break
            before_micro_batch(model, strategy, is_last)
            micro_batch = micro_batch.to(ranks.device)
            hidden = model(micro_batch)  # (targets, hidden_size): the states that predict
            loss_sum = chunked(model.head, hidden, micro_batch, token_losses, loss_sums)
            # Divided once, by the targets of the whole step. FSDP sums over ranks and does not average.
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
        norm = gradient_norm(parameters.values())
        # The one wait for the device. Both are sums over all ranks: every rank takes the same branch.
        step_loss, grad_norm = torch.stack([loss_sums.total / num_targets, norm.to(ranks.device)]).tolist()
        is_finite = math.isfinite(step_loss) and math.isfinite(grad_norm)
        skip = not is_finite or is_spike(progress.norms, grad_norm, config.optimizer.skip_spikes)
        if not skip:
            clip_gradients(parameters.values(), config.optimizer.max_grad_norm, norm)
            optimizer.step()
        if start.is_running:
            start.finish(progress.step + 1, log, ranks)
            log.say(memory_line(config.optimizer.memory, bytes_per_parameter(parameters, optimizer)))
        optimizer.zero_grad()
        # --------------------------------------------------------------------------------------------------------------

        progress.finish_step(batch, grad_norm, is_finite, skip)
        too_many_bad_steps = progress.bad_steps_in_a_row >= STOP_AFTER_BAD_STEPS
        meter.add(batch, inputs.deal(progress.step - 1), loss_sums)
        log.advance(progress.step)
        if progress.step % COLLECT_GARBAGE_EVERY == 0:
            gc.collect(1)
        if is_logged:
            row = {
                "train/loss": step_loss,
                "train/grad_norm": grad_norm,
                "train/learning_rate": rate,
            }
            row |= meter.row(progress, plan.passes(progress.step)[0])
            row |= ewc.curves(meter.seconds_per_step) if ewc else {}
            log.row(progress.step, row)
            log.say(meter.line(row, progress.step, total_steps, was_skipped=skip))

    # --- 5. The end: stopped by a signal, or finished and exported ----------------------------------------------------
    with stop.saving():
        for times in saver.close():
            log.save(times)
    if stopping:
        log.say(f"{stop.name or 'signal'}: {progress.stopped(total_steps)}; start again to continue")
    else:
        ranks.watch.at("the export")
        for line in export_run(config, progress, export_directory, model, model_config, tokenizer, ranks):
            log.say(line)
        log.say(log.where())
    log.close()
    return 0


if __name__ == "__main__":
    run_script(main)
