"""Full fine-tuning of a causal language model: one loop to read from top to bottom, and to edit.

    torchrun --nproc_per_node=8 train.py configs/long.py data.train=FILES
    torchrun --nproc_per_node=2 train.py configs/quickstart.py optimizer.learning_rate=1e-4 run.name=trial
    python train.py configs/quickstart.py
    python train.py configs/quickstart.py --dry-run    # print the plan, its memory and its time, and end
    python train.py configs/quickstart.py --quick-check    # masks, ends of answers and labels, without a step
    python train.py configs/quickstart.py --check      # prove the run before it is paid for (docs/check.md)

All weights are trained. Parameters, gradients and optimizer state are sharded over the ranks (FSDP2). configs/config.py
has all settings of a run. A run writes to runs/<name>/; started again, it continues from its last checkpoint.
"""

if __name__ == "__main__":
    from training.launch import before_imports

    before_imports(__file__, __doc__)  # a mistake ends here: the imports below take seconds

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configs.config import Optimizer, as_dict
from data.batches import StepBatch
from data.sources import MAIN, Corpus, mean_losses
from distributed.gradients import NORM_HISTORY, clip_gradients, gradient_norm, is_spike
from distributed.optimizer import adamw, check_optimizer
from distributed.process_group import StopSignal, random_state, set_random_state
from distributed.sharding import before_micro_batch, decoder_layers, evaluating, make_mesh, parallelize, reshard
from model.architectures import has_experts
from model.build import build, first_weights
from model.flops import count_work, find_peak
from model.language_model import PackedLanguageModel, trained_parameters
from model.loss import LossSums, anchored, chunked, negative_log_likelihood
from training.checkpointer import Checkpointer
from training.description import describe_run
from training.ending import check_budget, export_run, is_finished, lines_of_export
from training.evaluations import Evaluations
from training.inputs import Inputs, open_data
from training.launch import collect_garbage, freeze_garbage, launcher_note, run_program
from training.log import Log, Meter
from training.observe import Pace, Profile
from training.provenance import record_start
from training.quick_check import quick_check, with_loss
from training.start import TrainingRun, check_disks, join_run, read_config

STOP_AFTER_BAD_STEPS = 5  # in a row, with a loss or gradient norm that is not finite


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, min_ratio: float) -> float:
    """Return the learning rate at 0-based `step`: linear warm-up, then cosine decay to `min_ratio * peak` at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each target token: logits fp32 `(targets, vocabulary)`, targets `(targets,)` -> fp32 `(targets,)`.

    Any differentiable function can stand here. The loop sums the losses and divides once by the number of targets of the step.
    Targets come in parts of at most 256, which depend on the ranks: do not compute a mean or a quantile over them here.
    """
    return F.cross_entropy(logits, targets, reduction="none")


def make_optimizer(parameters: dict[str, torch.nn.Parameter], settings: Optimizer, seed: int) -> torch.optim.Optimizer:
    """Return the optimizer of `parameters`, which are this rank's shards by name. Any optimizer of torch can stand here.

    The `lr` of a group is its peak; `learning_rate` lowers all rates by the same factor. This AdamW takes 6 to 16 bytes per
    parameter, by optimizer.memory.
    """
    return adamw(parameters, settings, seed)


def validate(
    model: PackedLanguageModel, batches: Sequence[StepBatch], data: Inputs, corpus: Corpus, stop: StopSignal
) -> dict | None:
    """Return `validation/loss` by `token_losses` and `validation/nll`, -log p: means over targets in nats; None after a signal.

    Sources beside the main one have curves of their own, `validation/loss/NAME`. Every rank must call this.
    """
    device, count = stop.ranks.device, len(corpus.sources)
    loss_sums, nll_sums, num_targets = LossSums(count, device), LossSums(count, device), np.zeros(count)
    nll: list[torch.Tensor] = []  # of one micro-batch, whose targets come in parts

    def both_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nll.append(negative_log_likelihood(logits, targets))
        return token_losses(logits, targets)

    with evaluating(model):
        for batch in batches:
            num_targets += batch.targets_by_source  # if targets have weights, the sums of their weights
            for micro_batch in data.micro_batches(batch.items, corpus, stop.ranks):
                if stop.agreed():  # the same on every rank
                    return None
                nll.clear()
                hidden = model(micro_batch)
                loss_sums.total.add_(chunked(model.head, hidden, micro_batch, both_losses, loss_sums))
                nll_sums.add(nll, micro_batch)
    figures = {}
    for curve, sums in {"validation/loss": loss_sums, "validation/nll": nll_sums}.items():
        dist.all_reduce(sums.values)
        means = mean_losses(corpus, sums.by_source.tolist(), num_targets)
        figures |= {curve + (f"/{name}" if name != MAIN else ""): mean for name, mean in means.items()}
    return figures


def main() -> int:
    """Do one run, from its config to the exported model, and return the exit code. Every rank runs this."""
    # Before the process group, so that a mistake in a file ends in one sentence.
    config = read_config(__doc__)
    model, model_config, tokenizer = build(config)  # on meta: shapes without memory
    # `config` now has a number for each `auto`, and the date of chats. `data.plan` has the documents of each step.
    config, data = open_data(config, model, model_config, tokenizer, __file__)
    # The ranks agree on all inputs before anything is trained. A run directory has one owner.
    with join_run(config, data, model, model_config, tokenizer) as run:
        return train(run)


def train(run: TrainingRun) -> int:
    """Continue a run from its last checkpoint, or start it. Return the exit code.

    Every rank runs every line: most calls are collectives, and if a rank skips one, the others wait for ever.
    """
    # --- 1. Where the run stands --------------------------------------------------------------------------------------
    config, data, model, model_config = run.config, run.data, run.model, run.model_config
    stop, ranks, directory, total_steps = run.stop, run.ranks, run.directory, run.data.total_steps
    log = Log(directory, ranks, config.run.log_to, as_dict(config))
    evaluations = Evaluations(config, data.validation)
    checkpointer = Checkpointer(run, evaluations)
    record = checkpointer.record  # record.jsonl: what the run did
    # The counts of the loop: numbers and lists, the same on every rank and in every checkpoint. `updates` are the steps that
    # changed the weights, `targets` are counted by source, `norms` are the last gradient norms (skip_spikes).
    state = {"step": 0, "updates": 0, "tokens": 0, "targets": [0] * len(data.train.sources)}
    state |= {"skipped_steps": 0, "bad_steps_in_a_row": 0, "norms": [], "first_losses": []}
    notes = checkpointer.find(state, total_steps, log.kept)  # from here on `state` continues the newest checkpoint
    if is_finished(run, state["step"], evaluations, checkpointer.is_changed):
        return 0
    if config.run.check != "only":
        log.say(record_start(run, checkpointer, log))
    log.open(state["step"], evaluations.evaluated, total_steps)

    # --- 2. Model. The order matters: meta (above) -> checkpointing -> compile -> shard -> load this rank's slices ----
    torch.manual_seed(config.run.seed + ranks.rank)
    layers = decoder_layers(model, config.model.layer_class)
    mesh = make_mesh(ranks.device.type, ranks.world_size, config.sharding)
    units = model.extra_fsdp_units()
    gathering = parallelize(model, layers, units, mesh, run.compute_dtype, config.model, config.sharding)
    first_weights(model, config, ranks.device, is_resumed=checkpointer.resume_from is not None)
    model.train()
    if quick_check(run, state["step"], log.say) == "only":
        return 0
    # The run trains exactly the parameters that require a gradient here. To train one only from a later step on, give it a rate
    # of 0 until then.
    parameters = trained_parameters(model)

    # --- 3. Evaluations, and remedies against forgetting. They use the base's weights, which the model still has here --
    # A resume reads the base's weights only if the config needs them. If your own code needs them here, pass
    # is_resumed=False to `first_weights` above, or register a copy of them with the checkpointer.
    if data.validation:
        measure = functools.partial(validate, model, data.validation_batches, data, data.validation, stop)
        if data.questions:  # run.eval_generate
            from training.answers import Answers

            base, dtype, tokenizer = config.model.path, run.compute_dtype, run.tokenizer
            measure = Answers(measure, base, data.questions, model, model_config, dtype, tokenizer, stop, log.say)
        evaluations.functions["validation"] = measure
    if config.run.eval_general:
        from training.budget import AgainstBase

        evaluations.functions["forgetting"] = AgainstBase(model, run.compute_dtype, run.tokenizer, data, stop, log.say)
    if data.train.anchored:  # sources of data.mix that are trained by KL to the base
        from training.anchor import with_base

        data = with_base(data, model, run.identity, directory / "anchor", stop, log.say)
        record.add_prepared("anchor")
    ewc = None
    if config.ewc.strength:
        from model.ewc import start_penalty

        old, dealer, new_row = data.old_domain, data.dealer, data.first_new_row
        ewc = start_penalty(model, config.ewc, directory / "ewc", old, dealer, gathering, stop, log.say, new_row)
        record.add_prepared("ewc")

    routers = None
    if has_experts(model_config):
        from model.experts import Routers

        routers = Routers(model, config.model.router_aux, model_config, ranks.device)

    # --- 4. Optimizer, and the checkpoint if there is one -------------------------------------------------------------
    optimizer = make_optimizer(parameters, config.optimizer, config.run.seed)
    check_optimizer(optimizer, parameters, model, config.optimizer.memory, ranks)
    checkpointer.save_from(parameters, optimizer)
    # checkpointer.register(name, object): anything else with a `state_dict()`, such as an average of the weights
    notes += checkpointer.load(state)
    peak = find_peak(run.compute_dtype, ranks)
    meter = Meter(data.train, count_work(model, model_config), peak.flops, ranks.device)
    disk = check_disks(run, checkpointer.saver.stored_bytes())
    for line in describe_run(run, layers, optimizer, peak, notes, disk):
        log.say(line)

    # --- 5. The loop --------------------------------------------------------------------------------------------------
    steps = data.steps(state["step"], ranks)  # a thread prepares micro-batches while the device computes
    freeze_garbage()
    peak_rate, min_lr_ratio = config.optimizer.peak, config.optimizer.min_lr_ratio
    factors = [group["lr"] / peak_rate for group in optimizer.param_groups]  # 1, unless make_optimizer has other rates
    pace = Pace(layers, stop, state["step"])  # which rank is slow
    profile = Profile(config.run.profile, total_steps, directory, ranks, log.say) if config.run.profile else None
    stopping = False
    while True:
        # ---- between two steps: evaluate and save if due, stop where all ranks agree -----------------------------------
        with meter.paused():
            if state["bad_steps_in_a_row"] >= STOP_AFTER_BAD_STEPS:
                bad = f"loss or gradient norm was not finite in {STOP_AFTER_BAD_STEPS} steps in a row, up to step {state['step']}"
                checkpointer.give_up(bad, state["updates"])
            improved = False
            due = [] if stopping else evaluations.due(state["step"], total_steps)
            for name in due:
                ranks.watch.at(f"{name} after step {state['step']}")
                figures = evaluations.measure(name, ranks)
                if figures is not None:  # not cut short by a signal
                    is_best = evaluations.finish(name, figures, state["step"], state["updates"])
                    improved |= is_best
                    log.evaluation(state["step"], total_steps, figures, evaluations.remark(is_best))
                    record.evaluation(figures)
                    log.sync()
                    checkpointer.update(state)  # if this step is saved already, its checkpoint gets the evaluation too
            stopping = stopping or stop.agreed() or state["step"] >= (config.run.stop_at or math.inf)
            finished = state["step"] == total_steps or evaluations.is_stalled
            if finished and not stopping:
                # No later step would reveal bad weights, so the loss on the documents of the last good step must be finite.
                last_good = max(0, state["step"] - 1 - state["bad_steps_in_a_row"])
                figures = validate(model, [data.plan.batch(last_good)], data, data.train, stop)
                stopping = figures is None  # a signal came
                if figures and not all(map(math.isfinite, figures.values())):
                    bad = f"the loss of the last steps is not finite with the weights after step {state['step']}"
                    checkpointer.give_up(bad, state["updates"])
            # After a step that was not finite the weights may be bad: they are saved only once a finite loss has proven them.
            are_proven = improved or (finished and not stopping) or not state["bad_steps_in_a_row"]
            if are_proven and (improved or finished or stopping or checkpointer.is_due(state["step"])):
                ranks.watch.at(f"the save of step {state['step']}")
                log.sync()  # the rows of a saved step are durable
                with stop.saving():
                    checkpointer.save(state)
            for times in checkpointer.finished_saves():
                log.save(times)
        if finished or stopping:
            break

        if profile:
            profile.step(state["step"] + 1)
        # ---- one optimizer step: all of the mathematics is on these lines ---------------------------------------------
        batch = data.plan.batch(state["step"])
        num_targets = batch.num_target_tokens  # of all ranks and micro-batches; with weights, their sum
        is_logged = (state["step"] + 1) % config.run.log_every == 0 or state["step"] + 1 == total_steps
        ranks.watch.at(f"step {state['step'] + 1}")
        rate = learning_rate(state["step"], total_steps, data.warmup_steps, data.peak_share * peak_rate, min_lr_ratio)
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = rate * factor
        loss_sums = LossSums(len(data.train.sources), ranks.device)
        random_before = random_state(ranks)  # for a step that a signal ends
        if routers:
            routers.start(batch)
        step, micro_batches = next(steps)
        assert step == state["step"]
        for micro_batch, is_last in micro_batches:  # the same number on every rank
            stopping = stop.agreed()
            if stopping:
                break
            before_micro_batch(model, gathering, is_last)  # decides what FSDP gathers and reduces in it
            hidden = model(micro_batch)  # (targets, hidden_size): the states that predict
            # token_losses, but KL to the base at the targets of a source with `anchor`.
            losses = anchored(token_losses, micro_batch, config.forgetting.anchor_weight)
            loss_sum = chunked(model.head, hidden, micro_batch, losses, loss_sums)  # adds to loss_sums by source
            # Divided once, by the targets of the whole step. FSDP sums over ranks and does not average.
            loss = loss_sum / num_targets
            if routers:  # the auxiliary loss that balances the experts is no part of train/loss
                loss = loss + routers.loss(micro_batch, is_last)
            loss.backward()
            loss_sums.total.add_(loss_sum.detach())
        if stopping:  # discard the unfinished step: the next pass saves the state after the last finished one
            optimizer.zero_grad()
            reshard(model)
            set_random_state(random_before, ranks)
            continue
        dist.all_reduce(loss_sums.values)
        if ewc:
            ewc.add_gradient(state["step"], measure=is_logged)
        norm = gradient_norm(parameters.values())
        # The only wait for the device. Both numbers are the same on every rank, so every rank takes the same branch.
        step_loss, grad_norm = torch.stack([loss_sums.total / num_targets, norm.to(ranks.device)]).tolist()
        is_finite = math.isfinite(step_loss) and math.isfinite(grad_norm)
        skip = not is_finite or is_spike(state["norms"], grad_norm, config.optimizer.skip_spikes)
        if not skip:
            clip_gradients(parameters.values(), config.optimizer.max_grad_norm, grad_norm)
            optimizer.step()
        optimizer.zero_grad()
        # ---------------------------------------------------------------------------------------------------------------

        meter.add(batch, data.deal(state["step"]), loss_sums)
        state["step"] += 1
        record.add_step(state["step"], batch)
        state["updates"] += not skip
        state["skipped_steps"] += skip
        state["bad_steps_in_a_row"] = 0 if is_finite else state["bad_steps_in_a_row"] + 1
        if is_finite:
            state["norms"] = [*state["norms"], grad_norm][-NORM_HISTORY:]
        if config.run.check != "off":  # the same losses on every rank, so all stop together
            state["first_losses"] = with_loss(state["first_losses"], step_loss, state["step"], data.warmup_steps)
        state["tokens"] += sum(batch.document_lengths)
        state["targets"] = [a + b for a, b in zip(state["targets"], batch.targets_by_source, strict=True)]
        collect_garbage(state["step"])
        if is_logged:
            row = meter.row(state, data.plan.passes(state["step"])[0])  # its losses are means since the last row
            row |= {"train/grad_norm": grad_norm, "train/learning_rate": rate}
            row |= pace.row(state["step"], log.say)
            row |= ewc.curves() if ewc else {}
            row |= routers.curves() if routers else {}
            log.row(state["step"], row)
            log.say(meter.line(row, state["step"], total_steps, skip, is_finite))
        log.advance(state["step"])

    # --- 6. The end: stopped by a signal, or finished and exported ----------------------------------------------------
    if profile:
        profile.close(state["step"])
    with stop.saving():
        for times in checkpointer.close():
            log.save(times)
    # stop.name: the signal that this rank itself has received.
    why = "finished" if not stopping else stop.name or ("signal" if stop.stopped else "run.stop_at")
    record.add("stop", why=why)
    if stopping:
        log.say(
            f"{why}: {checkpointer.stopped(state, total_steps)}; start again to continue{launcher_note(stop.stopped)}"
        )
    else:
        ranks.watch.at("the export")
        contents = export_run(run, state, evaluations, record)
        for line in [*lines_of_export(run, state, evaluations, contents), log.where()]:
            log.say(line)
    log.close()
    if not stopping:
        check_budget(run)  # exit code 3 with forgetting.strict, if it is not met
    return 0


if __name__ == "__main__":
    run_program(main)
