"""Full fine-tuning of a causal language model: one loop, read from top to bottom, edit it.

    torchrun --nproc_per_node=8 train.py configs/xbrl.py
    torchrun --nproc_per_node=2 train.py configs/laptop.py optimizer.learning_rate=1e-4 run.name=trial
    python train.py configs/laptop.py

All weights are trained. Parameters, gradients and optimizer state are sharded over the ranks (FSDP2). What a run can be
told is in configs/config.py; what it writes is in runs/<name>/. Started again, it continues from its last checkpoint.
"""

import argparse
import gc
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.errors import UserError, exit_with_one_sentence
from configs.config import Config, as_dict, check_world, load_config, override, schedule_warnings, settings_lines
from configs.loading.deepspeed import from_deepspeed
from data.batches import MicroBatch, Plan, ahead, collate, micro_batches, plan_training, plan_validation
from data.files import check_there
from data.sources import MAIN, Corpus, Reader, mean_losses
from data.tokens import load_tokenizer
from distributed.checkpoint import (
    best_checkpoint,
    broadcast_from_first,
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    update_state,
)
from distributed.export import export_model
from distributed.optimizer import bytes_per_parameter, check_memory, gradient_norm, make_optimizer, parameter_dtype
from distributed.process_group import Ranks, StopSignal, agree_any, start_process_group, world_size_from_environment
from distributed.sharding import before_micro_batch, decoder_layers, has_native_bf16, make_mesh, reshard, spread
from eval.forgetting import measure_forgetting, start_forgetting
from model.ewc.batches import fisher_batches
from model.ewc.penalty import first_new_row, made_from, start_ewc
from model.flops import count_work, peak_flops, step_flops
from model.language_model import build_on_meta, load_weights, num_parameters, parameter_names, read_model_config
from model.loss import LossBySource
from model.rope import check_length
from training.run_log import RunLog, peak_memory_gib, write_provenance

STOP_AFTER_BAD_STEPS = 5  # in a row with a loss or gradient norm that is not finite
COLLECT_GARBAGE_EVERY = 50  # steps


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, min_ratio: float) -> float:
    """Of 0-based `step`: linear warm-up to the peak, then a cosine that reaches `min_ratio * peak` at the last step, if there are two."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def validate(
    model: torch.nn.Module, plan: Plan, corpus: Corpus, config: Config, ranks: Ranks, stop: StopSignal
) -> dict[str, float] | None:
    """Mean loss of each source's target tokens (nats). Every rank runs as many forwards. None if a signal came."""
    model.eval()
    sums = torch.zeros(1 + len(corpus.sources), device=ranks.device)  # of all losses, then by source
    targets = np.zeros(len(corpus.sources), dtype=np.int64)
    by_source = LossBySource(sums[1:]) if len(corpus.sources) > 1 else None
    stopped = False
    with torch.no_grad():
        for batch in map(plan.batch, range(plan.num_steps)):
            targets += batch.targets_by_source
            for micro in micro_batches(batch.rows, corpus, ranks.rank, ranks.world_size, config.batch.micro_batch):
                stopped = stopped or agree_any(stop.name is not None, ranks)
                if not stopped:  # agreed: the same on every rank
                    sums[0] += model(collate(micro, corpus).to(ranks.device), by_source)
    reshard(model)
    model.train()
    if stopped:
        return None
    dist.all_reduce(sums)
    return mean_losses(corpus, sums.tolist(), targets)


def main() -> int:
    """One run, from its config to the exported model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of configs/, e.g. configs/laptop.py")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. batch.global_examples=32")
    parser.add_argument(
        "--deepspeed", metavar="FILE", help="apply a DeepSpeed JSON file to the config (docs/migrating.md)"
    )
    arguments = parser.parse_intermixed_args()

    # --- Config and data. All of it before a process group starts, so that a mistake is one sentence. -----------------
    first = int(os.environ.get("RANK", 0)) == 0
    config = load_config(arguments.config)
    world_size, ranks_per_node = world_size_from_environment()
    if arguments.deepspeed:
        config, notes = from_deepspeed(config, arguments.deepspeed, world_size)
        notes += [f"{', '.join(arguments.overrides)} on the command line: comes last"] if arguments.overrides else []
        print("\n".join(f"deepspeed: {note}" for note in notes) if first else "", end="\n" if first else "")
    config = override(config, arguments.overrides)
    check_world(config, world_size, ranks_per_node)
    check_memory(config.optimizer.memory)
    run_directory = Path(config.run.directory) / config.run.name
    checkpoints = run_directory / "checkpoints"
    if config.run.resume == "never" and run_directory.exists():
        raise UserError(f"{run_directory} exists and run.resume=never; choose another run.name or remove it")

    rope = (config.model.rope_type, config.model.rope_factor, config.model.rope_original_length)
    model_config = read_model_config(config.model.path, *rope)
    model = build_on_meta(model_config).to(parameter_dtype(config.optimizer.memory))  # shapes without memory
    layers = decoder_layers(model, config.model.layer_class)
    layer_name = type(layers[0]).__name__
    tokenizer = load_tokenizer(config.model.path)
    check_length(config.data.sequence_length, model_config, config.model.path)
    if config.model.rope_type:
        tokenizer.model_max_length = model_config.max_position_embeddings  # of the export: tools warn or cut there

    files = [*config.data.train, *config.data.validation, *(config.ewc.data if config.ewc.strength else ())]
    check_there(files + [path for source in config.data.mix for path in (*source.paths, *source.validation)])
    reader = Reader(
        tokenizer, model_config.vocab_size, config.data.sequence_length, config.data.too_long, show_progress=first
    )
    train = reader.training(config.data.train, config.data.mix)
    validation = reader.validation(config.data.validation, config.data.mix)
    plan = plan_training(
        train,
        config.optimizer.epochs,
        config.run.seed,
        config.data.sequence_length,
        config.batch.global_examples,
        config.batch.global_tokens,
        config.data.packing,
    )
    validation_plan = plan_validation(validation, config.data.sequence_length) if validation else None
    total_steps = min(plan.num_steps, config.optimizer.max_steps or plan.num_steps)
    warmup_steps = config.optimizer.warmup_steps
    if warmup_steps is None:
        warmup_steps = math.ceil(config.optimizer.warmup_ratio * total_steps)
    squares = None
    if config.ewc.strength and config.ewc.data:  # the old domain's documents, for the Fisher diagonal (docs/ewc.md)
        old = reader.training(config.ewc.data, ()).sources[0]
        rows_of = (config.data.sequence_length, config.batch.micro_batch, config.data.packing)
        squares = fisher_batches(old, config.ewc.documents, config.ewc.batch, config.ewc.seed, *rows_of)
    # What the step number means. A resume under another meaning would train on the wrong data, so it is refused.
    meaning = {
        "a vocabulary of model.path (tokens)": model_config.vocab_size,
        "data.train": train.sources[0].fingerprint,
        "data.mix": train.mixture(),
        "run.seed": config.run.seed,
        "data.sequence_length": config.data.sequence_length,
        "data.packing": config.data.packing,
        "batch.global_examples": config.batch.global_examples,
        "batch.global_tokens": config.batch.global_tokens,
        "optimizer.memory": config.optimizer.memory,
        "ewc.strength": config.ewc.strength,
        "ewc": made_from(config.ewc, squares) if config.ewc.strength else None,
        "model.rope_type, rope_factor or rope_original_length": model_config.rope_parameters,
    }

    # --- Processes. ---------------------------------------------------------------------------------------------------
    ranks = start_process_group()
    stop = StopSignal()
    torch.manual_seed(config.run.seed + ranks.rank)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)

    # Rank 0 looks for a checkpoint, and all resume from what it saw.
    resume_from = broadcast_from_first(latest_checkpoint(checkpoints) if ranks.rank == 0 else None, ranks)
    state = {"step": 0, "skipped": 0, "bad_run": 0, "empty": 0, "evaluated": -1, "forgetting": -1, "best_loss": None}
    state |= {"tokens": 0, "targets": [0] * len(train.sources)}
    if resume_from:
        state |= read_state(resume_from)
        for key, value in meaning.items():
            before = state["meaning"].get(key, value)  # a key that is new since then says nothing
            if before != value:
                other = {"data.train": "other data in data.train", "data.mix": "another data.mix"}
                what = other.get(key, f"{key}={before}, now it is {value}")
                raise UserError(f"{resume_from} was made with {what}; set it back, or start anew with another run.name")
        if state["step"] > total_steps:
            raise UserError(f"{resume_from} is at step {state['step']}, beyond the {total_steps} steps of this config")
    state["meaning"] = meaning

    log = RunLog(run_directory, ranks.rank, state["step"], total_steps)
    if ranks.rank == 0:
        record = write_provenance(run_directory, as_dict(config))
        log.say(f"run {run_directory}, commit {record['git_commit'][:12]}, torch {torch.__version__}")
    export_directory = run_directory / "export"
    if broadcast_from_first(state["step"] == total_steps and export_directory.is_dir(), ranks):
        log.say(f"finished before: {total_steps} steps, exported to {export_directory}; nothing to do")
        log.close()
        dist.destroy_process_group()
        return 0

    # --- Model. The order matters: meta (above) -> checkpointing -> compile -> shard -> load this rank's own slices. ---
    compute_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.model.compute_dtype]
    if compute_dtype == torch.bfloat16 and not has_native_bf16(ranks.device):
        compute_dtype = torch.float32
        log.say("this processor has no native bf16: computing in fp32 instead")
    sharding = config.sharding
    mesh = make_mesh(ranks.device.type, ranks.world_size, sharding.strategy, sharding.shard_size or ranks_per_node)
    spread(
        model,
        layers,
        model.own_units(),
        mesh,
        compute_dtype,
        strategy=sharding.strategy,
        cpu_offload=sharding.cpu_offload,
        activation_checkpointing=config.model.activation_checkpointing,
        checkpoint_every=config.model.checkpoint_every,
        compile_layers=config.model.compile,
    )
    home = torch.device("cpu") if sharding.cpu_offload else ranks.device  # where parameters and moments live
    load_weights(model, config.model.path, home, ranks.device)
    model.train()
    # While the model holds the base's weights. A signal ends both early; the loop sees it too, and takes no step.
    general = ewc = None
    new_rows = first_new_row(config.model.path)
    if config.run.eval_general:
        limits = (config.data.sequence_length, config.batch.micro_batch)
        general = start_forgetting(model, tokenizer, *limits, ranks, stop, new_rows)
        log.say(general.line())
    if config.ewc.strength:
        ewc = start_ewc(
            model, config.ewc, run_directory / "ewc", squares, sharding.strategy, ranks, stop, log.say, new_rows
        )
    parameters = parameter_names(model)
    optimizer = make_optimizer(parameters, config.optimizer, config.run.seed)
    if resume_from:
        load_checkpoint(resume_from, parameters, optimizer, ranks)

    # Sum over ranks of what each can do while the others are busy too: what MFU is measured against.
    work = count_work(model, model_config)
    peak, peak_source = peak_flops(ranks.device, compute_dtype)
    peaks = torch.tensor(peak, dtype=torch.float64)
    dist.all_reduce(peaks, group=ranks.flags)
    peak = peaks.item()

    log.say(
        f"model {config.model.path}: {num_parameters(model):,} parameters, all trained; {len(layers)} x {layer_name}"
    )
    for line in train.lines("train", plan.passes(total_steps)) + (validation.lines("validation") if validation else []):
        log.say(line)
    settings = {
        "compute": str(compute_dtype).removeprefix("torch."),
        "optimizer memory": config.optimizer.memory,
        "peak": f"{peak / 1e12:.2f} TFLOP/s ({peak_source})",
        "window": f"{model_config.max_position_embeddings} positions, RoPE {config.model.rope_type or 'as the model has it'}",
    }
    for line in settings_lines(config, len(plan.batch(0).rows), ranks.world_size, settings):
        log.say(line)
    log.say(
        f"schedule: {total_steps} steps ({plan.steps_per_epoch[0]} in the first epoch), {warmup_steps} of warm-up, "
        f"peak learning rate {config.optimizer.learning_rate:g}, cosine to {config.optimizer.min_lr_ratio:g} of it"
    )
    for warning in schedule_warnings(config, num_parameters(model), total_steps, warmup_steps):
        log.say(f"warning: {warning}")
    if resume_from:
        log.say(f"resumed from {resume_from}")

    # --- The loop. `step` counts finished steps; what is due at a step is done before the next one starts. ------------
    step, saved = state["step"], state["step"]
    # Counted on the device, read only where a number is logged.
    skipped = torch.tensor(state["skipped"], device=ranks.device)
    bad_run = torch.tensor(state["bad_run"], device=ranks.device)
    stopping = False

    def micro_batches_from(first_step: int) -> Iterator[tuple[MicroBatch, bool]]:
        """This rank's micro-batches of all steps to come, each with whether it is its step's last; as many on every rank."""
        for batch in map(plan.batch, range(first_step, total_steps)):
            if batch.num_target_tokens:
                dealt = micro_batches(batch.rows, train, ranks.rank, ranks.world_size, config.batch.micro_batch)
                for i, micro in enumerate(dealt, 1):
                    yield collate(micro, train), i == len(dealt)

    upcoming = ahead(micro_batches_from(step))  # a thread makes them while the device computes
    # Python's garbage collector would stop one rank, and with it all others, at any moment: collect at the same steps.
    gc.collect()
    gc.freeze()
    gc.disable()
    measured = False
    window_start, window_steps, window_tokens, window_flops = time.perf_counter(), 0, 0, 0.0
    window_sums, window_targets = 0.0, 0  # by source, since the last row that was logged
    while True:
        paused = time.perf_counter()  # validating and saving do not count as time of a step
        every = config.run.eval_every
        eval_due = step in (0, total_steps) or (every > 0 and step % every == 0)
        improved = False
        if validation and eval_due and state["evaluated"] != step and not stopping:
            losses = validate(model, validation_plan, validation, config, ranks, stop)
            if losses is not None:
                loss = losses.get(MAIN, math.nan)  # of data.validation alone, with and without a mix
                improved = math.isfinite(loss) and (state["best_loss"] is None or loss < state["best_loss"])
                state |= {"evaluated": step, "best_loss": loss if improved else state["best_loss"]}
                log.row(step, {"validation/loss" + (f"/{n}" if n != MAIN else ""): v for n, v in losses.items()})
                if 0 < step == saved:
                    update_state(checkpoints, state, ranks, improved)
                told = ", ".join(f"{v:.4f}" if n == MAIN else f"{n} {v:.4f}" for n, v in losses.items())
                log.say(f"step {step}/{total_steps} | validation loss {told}" + (" (best)" if improved else ""))

        if general and eval_due and state["forgetting"] != step and not stopping:
            figures = measure_forgetting(general, model, ranks, stop)
            if figures is not None:
                state["forgetting"] = step
                log.row(step, figures)
                if 0 < step == saved:
                    update_state(checkpoints, state, ranks, False)
                told = ", ".join(f"{name.removeprefix('forgetting/')} {value:.4g}" for name, value in figures.items())
                log.say(f"step {step}/{total_steps} | general: {told}")

        stopping = agree_any(stopping or stop.name is not None, ranks)
        save_due = (
            step == total_steps or stopping or improved or (config.run.save_every and step % config.run.save_every == 0)
        )
        if save_due and step > saved:
            state |= {"step": step, "skipped": int(skipped), "bad_run": int(bad_run)}
            save_checkpoint(checkpoints, state, parameters, optimizer, ranks, config.run.keep_last, improved)
            saved = step
        window_start += time.perf_counter() - paused
        if stopping or step == total_steps:
            break

        # One optimizer step: all micro-batches, then clip, then AdamW.
        batch = plan.batch(step)
        num_targets = batch.num_target_tokens
        # Known to every rank from the plan: nothing to learn, and decay alone would change weights.
        if num_targets == 0:
            state["empty"] += 1
            step += 1
            log.say(f"step {step}/{total_steps} | no target token in it: nothing is changed")
            log.advance(step)
            continue
        rate = learning_rate(
            step, total_steps, warmup_steps, config.optimizer.learning_rate, config.optimizer.min_lr_ratio
        )
        for group in optimizer.param_groups:
            group["lr"], group["noise_step"] = rate, step
        # Of all losses, then by source where there are several.
        sums = torch.zeros(1 + len(train.sources) * (len(train.sources) > 1), device=ranks.device)
        by_source = LossBySource(sums[1:]) if len(train.sources) > 1 else None
        for micro, last in upcoming:  # as many on every rank
            stopping = agree_any(stop.name is not None, ranks)
            if stopping:
                break
            before_micro_batch(model, sharding.strategy, last)
            loss = model(micro.to(ranks.device), by_source)
            # Divided once by the target tokens of the whole step; FSDP adds up over ranks and does not average.
            (loss / num_targets).backward()
            sums[0] += loss.detach()
            if last:
                break
        if stopping:  # the unfinished step is thrown away: what is saved is the state after the last finished one
            optimizer.zero_grad()
            reshard(model)
            continue
        dist.all_reduce(sums)
        loss_sum = sums[0]  # of the data alone: EWC's penalty is a curve of its own
        if ewc:  # a logged step's curves are those of the weights that its gradient was taken at
            ewc.add_gradient(step, measure=(step + 1) % config.run.log_every == 0 or step + 1 == total_steps)
        grad_norm = gradient_norm(parameters.values()).to(ranks.device)
        # The same on every rank, since both are sums over all ranks. AdamW reads it on the device and skips.
        bad = ~(torch.isfinite(loss_sum) & torch.isfinite(grad_norm))
        optimizer.found_inf = bad.float().to(home)
        # Clipping: AdamW divides the gradients by this as it reads them.
        optimizer.grad_scale = (grad_norm / config.optimizer.max_grad_norm).clamp(min=1.0).to(home)
        if not measured:
            measured = True
            sizes = bytes_per_parameter(parameters, optimizer)
            log.say(
                f"optimizer memory {config.optimizer.memory}: {sizes['total']:.2f} bytes per parameter measured (weights "
                f"{sizes['weights']:.2f}, gradients {sizes['gradients']:.2f}, moments {sizes['moments']:.2f})"
            )
        optimizer.step()
        optimizer.zero_grad()
        skipped += bad
        # Once the limit is reached it stays, so that it is seen wherever the next number is logged.
        bad_run = torch.where(bad | (bad_run >= STOP_AFTER_BAD_STEPS), bad_run + 1, torch.zeros_like(bad_run))
        step += 1
        if step % COLLECT_GARBAGE_EVERY == 0:
            gc.collect(1)

        state["tokens"] += sum(batch.document_lengths)
        state["targets"] = [a + b for a, b in zip(state["targets"], batch.targets_by_source, strict=True)]
        window_steps += 1
        window_tokens += sum(batch.document_lengths)
        window_flops += step_flops(work, batch.document_lengths, num_targets)
        window_sums, window_targets = window_sums + sums, window_targets + np.array(batch.targets_by_source)
        log.advance(step)
        if step % config.run.log_every == 0 or step == total_steps:
            mean_loss, norm = loss_sum.item() / num_targets, grad_norm.item()  # here the host waits for the device
            seconds = time.perf_counter() - window_start
            memory = peak_memory_gib(ranks.device)
            eta = seconds / window_steps * (total_steps - step)
            row = {
                "train/loss": mean_loss,
                "train/grad_norm": norm,
                "train/learning_rate": rate,
                "train/tokens_per_second": window_tokens / seconds,
                "train/mfu": window_flops / seconds / peak,
                "train/memory_gib": memory,
                "train/epoch": plan.passes(step)[0],
                "train/tokens": state["tokens"],
                "train/skipped_steps": int(skipped),
            }
            if by_source:
                means = mean_losses(train, window_sums.tolist(), window_targets)
                row |= {f"train/loss/{name}": loss for name, loss in means.items()}
                shares = zip(train.names, state["targets"], strict=True)
                row |= {f"train/share/{name}": count / sum(state["targets"]) for name, count in shares}
            if ewc:
                row |= ewc.curves(seconds / window_steps)
            log.row(step, row)
            log.say(
                f"step {step}/{total_steps} | loss {mean_loss:.4f} | grad norm {norm:.3f} | lr {rate:.2e} | "
                f"{row['train/tokens_per_second']:,.0f} tok/s | MFU {row['train/mfu']:.1%} | {memory:.1f} GiB | "
                f"ETA {eta / 60:.1f} min"
                + (f" | EWC {row['ewc/penalty']:.3g}, {row['ewc/time']:.1%} of the step" if ewc else "")
                + (f" | SKIPPED, not finite ({int(skipped)} so far)" if bad else "")
            )
            window_start, window_steps, window_tokens, window_flops = time.perf_counter(), 0, 0, 0.0
            window_sums, window_targets = 0.0, 0
            if bad_run >= STOP_AFTER_BAD_STEPS:
                log.close()
                raise UserError(
                    f"loss or gradient norm was not finite in {STOP_AFTER_BAD_STEPS} steps in a row, up to step {step}; the last "
                    f"checkpoint ({checkpoints / f'step-{saved:06d}' if saved else 'none yet: the base model'}) is good: "
                    "lower optimizer.learning_rate or look at the data of these steps"
                )

    # --- The end: stopped by a signal, or finished and exported. -----------------------------------------------------
    if stopping:
        log.say(
            f"{stop.name or 'signal'}: stopped after step {step}/{total_steps}"
            + (", saved" if saved else "")
            + "; start again to continue"
        )
    else:
        best = broadcast_from_first(best_checkpoint(checkpoints) if ranks.rank == 0 else None, ranks)
        if config.run.export == "best" and best:
            load_checkpoint(best, parameters, None, ranks)

        def write_rest(folder: Path) -> None:
            model_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            generation = Path(config.model.path) / "generation_config.json"
            if generation.is_file():
                shutil.copy(generation, folder)

        export_dtype = getattr(model_config, "dtype", None) or torch.bfloat16
        export_model(export_directory, parameters, export_dtype, ranks, write_rest)
        log.say(f"exported to {export_directory}; curves: tensorboard --logdir {run_directory / 'tensorboard'}")
    log.close()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    exit_with_one_sentence(main)
