"""The plan as text of at most 100 columns."""

import textwrap
from collections.abc import Iterable
from operator import attrgetter

from scripts.plan.machines import GIB
from scripts.plan.planner import Plan
from scripts.plan.search import STRATEGIES, SearchResult
from training.description import counted
from training.micro_batch import largest_useful

WIDTH = 100
SAVE_BANDWIDTH = 1e9  # bytes/s of a disk, for the printed time of a save
TERMS = {
    "parameters": "this rank's part of the weights",
    "gradients": "this rank's part of them, from backward to the optimizer's step",
    "optimizer": "AdamW's two moments of this rank's part",
    "ewc": "Fisher diagonal and reference",
    "gathered": "whole weights while layers use them, in the compute dtype",
    "reduction": "gradients of a layer or of the vocabulary while ranks add them up",
    "activations": "what the worst micro-batch keeps for backward, and one layer's backward",
    "logits": "one chunk of the head, and the gradients of its input and weights",
    "other": "CUDA context, NCCL's buffers",
    "headroom": "for fragmentation",
}
# The settings that memory depends on, beside batch.micro_batch.
SETTINGS = (
    *("sharding.strategy", "sharding.cpu_offload", "optimizer.memory", "model.activation_checkpointing"),
    *("model.checkpoint_every", "model.mlp_tiles", "sharding.context", "data.sequence_length"),
)


def text(result: SearchResult, assumed: Iterable[str], show_all: bool = False) -> str:
    """Return the whole plan. `assumed` are assumptions about the machine, in words. `show_all` lists every setting."""
    own = result.own
    blocks = [
        _subject(own, assumed),
        _memory(own),
        _host_and_disk(own),
        _time(own) if own.fits else [],
        _table(result, show_all),
        _proposals(result),
        _instead(result),
    ]
    words = "\n\n".join("\n".join(block) for block in blocks if block)
    if own.layout.on_cuda:
        return words
    return words.replace(TERMS["other"], "code and libraries").replace("GPU", "process")


def _subject(own: Plan, assumed: Iterable[str]) -> list[str]:
    shape, cluster, workload = own.shape, own.cluster, own.workload
    device, devices, worst, steps = cluster.device, cluster.devices, workload.worst, workload.steps
    trained = f", {shape.num_trained / 1e6:,.1f}M of them trained (LoRA)" if shape.frozen_itemsize else ""
    targets = sum(step.targets for step in steps) / sum(step.tokens for step in steps)
    micro_batches = [step.micro_batches for step in steps]
    fewest = f"{min(micro_batches)}-" if min(micro_batches) < max(micro_batches) else ""
    sharing, context = f"each of {devices:,} ranks" if devices > 1 else "1 rank", own.config.sharding.context
    if context > 1:
        sharing = f"each of {counted(devices // context, 'group')} of {context} ranks, which share its tokens"
    link = f", {device.link / 1e9:.3g} GB/s to each other" if devices > 1 else ""
    network = f", {cluster.network / 1e9:.0f} GB/s between nodes" if cluster.nodes > 1 else ""
    looked = "all steps looked at" if workload.is_exact else "not all steps looked at"
    labelled = [
        (
            "model",
            f"{own.config.model.path}: {shape.num_parameters / 1e9:.2f}B parameters{trained}, {len(shape.layers)} layers",
        ),
        *(("data", line) for line in own.subject.lines),
        (
            "plan",
            f"{counted(workload.total_steps, 'step')} of {workload.mean_tokens:,.0f} tokens on average ({targets:.0%} of them "
            f"targets), in {fewest}{counted(max(micro_batches), 'micro-batch')} on {sharing}; {workload.tokens / 1e6:,.1f}M "
            "tokens in total",
        ),
        (
            "worst",
            f"micro-batch {worst.tokens:,} tokens in {counted(len(worst.lengths), 'document')}, {worst.targets:,} targets: step "
            f"{worst.step + 1}, rank {worst.rank} ({looked})",
        ),
        (
            "machine",
            f"{devices} x {device.name} on {counted(cluster.nodes, 'node')}: {gib(device.memory)} GiB usable, "
            f"{device.flops / 1e12:.3g} TFLOP/s, {device.bandwidth / 1e12:.3g} TB/s memory{link}{network}",
        ),
        *(("assumed", line) for line in assumed),
    ]
    return [line for label, words in labelled for line in _wrapped(f"{label:10}{words}", " " * 10)]


def _memory(own: Plan) -> list[str]:
    config, device = own.config, own.cluster.device
    values = [f"{key}={attrgetter(key)(config)}" for key in SETTINGS]
    settings = " ".join(value for value in values if not value.endswith(("=1", "=False")))
    settings += f" batch.micro_batch={config.batch.rows}"
    settings += " (auto)" if own.subject.config.batch.micro_batch == "auto" else ""
    why = " (a rank's part of any step)" if own.largest_rows == largest_useful(config, own.cluster.devices) else ""
    total = f"  {'total':12}{gib(own.memory.total):>8}  "
    if own.layout.on_cuda:
        rest = (device.memory - own.memory.total) / GIB
        verdict = f"fits, {rest:,.1f} left" if rest >= 0 else f"does not fit, {-rest:,.1f} too much"
        lines = [f"{total}of {gib(device.memory)}: {verdict}"]
    else:
        least, most = own.needed
        verdict = "fits" if most <= device.memory else "may not fit" if least <= device.memory else "does not fit"
        lines = [
            total + "with pages of files and what the allocator keeps, a process holds",
            f"  {'':20}  {gib(least)} to {gib(most)} of {gib(device.memory)}: {verdict}",
        ]
    return [
        *_wrapped("settings  " + settings, " " * 10),
        "",
        "Memory of the fullest GPU at the peak of a step, GiB",
        *(f"  {name:12}{gib(size):>8}  {TERMS[name]}" for name, size in vars(own.memory).items() if size > 0),
        *lines,
        f"  largest batch.micro_batch that fits: {own.largest_rows or 'none'}{why}",
    ]


def _host_and_disk(own: Plan) -> list[str]:
    disk, run = own.disk, own.config.run
    lines = []
    if total := sum(own.host.values()):
        terms = ", ".join(f"{name} {gib(size)}" for name, size in own.host.items() if size)
        lines.append(f"Memory of a node's host: {gib(total)} GiB ({terms})")
    save, export = disk["checkpoint"] / SAVE_BANDWIDTH, 2 * disk["export"] / SAVE_BANDWIDTH
    times = f"A save: {save:,.0f} s at {SAVE_BANDWIDTH / 1e9:g} GB/s"
    times += f"; the export: {export:,.0f} s, written and read again by one rank"
    if save > 60 * run.timeout_minutes and not run.async_save:
        times += f"; warning: raise run.timeout_minutes={run.timeout_minutes:g}, which ends a run that waits longer"
    return [
        *lines,
        f"Disk: a checkpoint {gib(disk['checkpoint'])} GiB, a run with keep_last={run.keep_last} at most "
        f"{gib(disk['run'])} GiB, the export {gib(disk['export'])} GiB",
        *_wrapped(times, "  "),
    ]


def _time(own: Plan) -> list[str]:
    speed = own.speed
    lines = [
        f"Expected: {_tokens(own)} tokens/s per GPU, {_hours(speed.hours)} hours, {_hours(own.gpu_hours)} GPU-hours"
    ]
    if own.layout.on_cuda:  # on a CPU the middle of the range is not meant to be printed
        total = sum(speed.parts.values())
        parts = [f"{name} {part / total:.0%}" for name, part in speed.parts.items() if part / total > 0.005]
        lines += _wrapped(f"Where a mean step's time goes: {', '.join(parts)}", "  ")
    return lines


def _table(result: SearchResult, show_all: bool) -> list[str]:
    """Return a line for each strategy and optimizer.memory with its best checkpointing, or for every setting."""
    plans = sorted(result.plans, key=lambda plan: (-plan.rate, plan.memory.total))
    title = "setting, the fastest first"
    if not show_all:
        best = {}
        for plan in plans:  # the fastest that fits, else the plan with the least memory
            sharding = plan.config.sharding
            spread = sharding.context, sharding.cpu_offload, STRATEGIES.index(sharding.strategy)
            best.setdefault((*spread, -plan.bytes_per_parameter), plan)
        plans = [best[key] for key in sorted(best)]
        title = "strategy and optimizer.memory with its best checkpointing (--all: every kind)"
    device = "GPU" if result.own.layout.on_cuda else "process"
    width = max(18, *(1 + len(_strategy(plan)) for plan in plans))
    lines = _wrapped(
        f"Every {title}: batch.micro_batch, or a smaller one if yours does not fit, and the largest that fits; GiB per GPU and of a "
        "node's host; tokens/s per GPU" + "; N= is sharding.context" * any(" N=" in _strategy(plan) for plan in plans)
    )
    lines.append(
        f"  {'strategy':{width}}{'memory':8}{'checkpointing':14}{'mb':>5}{'largest':>9}{device:>9}{'host':>8}{'tokens/s':>15}  fits"
    )
    for plan in plans:
        speed = _tokens(plan) if plan.fits else ""
        lines.append(
            f"  {_strategy(plan):{width}}{plan.config.optimizer.memory:8}{_checkpointing(plan):14}{plan.config.batch.rows:>5}"
            f"{plan.largest_rows:>9}{gib(plan.memory.total):>9}{gib(sum(plan.host.values())):>8}{speed:>15}  "
            f"{'yes' if plan.fits else 'no'}"
        )
    return lines


def _proposals(result: SearchResult) -> list[str]:
    """Return the cheapest setting that fits and those worth a look, as lines to paste; else the nearest setting."""
    best = result.cheapest
    if best is None:
        return _nothing_fits(result)
    lines = ["Your settings fit; nothing needs to change."]
    if best is not result.own:
        lines = ["Your settings do not fit. The cheapest that do:", *_paste(best)]
    if faster := result.faster:
        lines.append(f"About {faster.rate / best.rate:.1f} times as fast, with the same precision or more:")
        lines += _paste(faster)
    if lighter := result.lighter:
        precision = f"{lighter.config.optimizer.memory}, whose rounding changes the training (docs/performance.md)"
        lines += [f"About {lighter.rate / best.rate:.1f} times as fast, with {precision}:", *_paste(lighter)]
    if best is result.own and not (faster or lighter):
        lines.append("No other setting is expected to be much faster.")
    return lines


def _nothing_fits(result: SearchResult) -> list[str]:
    nearest = result.nearest
    assert nearest
    group, units = (1, "GPUs") if nearest.layout.on_cuda else (nearest.cluster.per_node, "machines")
    return [
        "No setting fits, not even with fewer bytes per parameter. With yours, the nearest needs",
        f"  {gib(nearest.needed[1])} GiB per GPU where {gib(nearest.cluster.device.memory)} are usable:",
        *_overrides(nearest),
        f"It would fit on {result.devices // group} {units} of this kind."
        if result.devices
        else f"Not even 64 times as many {units} of this kind would be enough.",
    ]


def _instead(result: SearchResult) -> list[str]:
    """Return the commands that train less of the model, or less of a model; [] if full training fits."""
    lines = []
    if result.lora and not result.lora.fits:
        lora = result.lora
        lines += [
            f"LoRA (lora.rank={lora.config.lora.rank}) needs {gib(lora.needed[1])} GiB per GPU and does not fit either; a 4-bit",
            "base, which other tools have, needs less.",
        ]
    elif result.lora:
        lines += [
            "LoRA instead trains adapters beside the frozen weights, at a rate of its own:",
            *_needs(result.lora),
        ]
        lines += _command(result.lora, result.own, result.lora.config.model.path)
    if result.smaller:
        name = result.smaller.config.model.path
        directory = f"artifacts/models/{name.rpartition('/')[2]}"
        lines += [f"All weights of a smaller model fit, {name}:", *_needs(result.smaller)]
        lines.append(f"    python scripts/fetch_base_model.py {name}")
        lines += _command(result.smaller, result.own, directory)
    return lines


def _command(plan: Plan, own: Plan, path: str) -> list[str]:
    """Return the command line of train.py for a plan of another config or model than the user's."""
    ranks = plan.cluster.per_node
    start = f"torchrun --nproc_per_node={ranks}" if ranks > 1 else "python"
    keys = ("model.path", "lora.rank", "optimizer.learning_rate")
    values = ((key, attrgetter(key)(plan.config), attrgetter(key)(own.subject.config)) for key in keys)
    changes = [f"{key}={path if key == 'model.path' else value}" for key, value, before in values if value != before]
    words = " ".join([start, "train.py CONFIG", *changes, *plan.overrides])
    lines = textwrap.wrap(words, WIDTH - 6, break_long_words=False)
    return ["    " + line + " \\" * (line is not lines[-1]) for line in lines]


def _paste(plan: Plan) -> list[str]:
    """Return the needs of a proposal, and its lines for the command line."""
    return [*_needs(plan), *_overrides(plan)]


def _needs(plan: Plan) -> list[str]:
    host = sum(plan.host.values())
    needs = f"{gib(plan.memory.total)} GiB per GPU" + (f", {gib(host)} GiB of a node's host" if host else "")
    return [f"  ({needs}; {_tokens(plan)} tokens/s per GPU, {_hours(plan.gpu_hours)} GPU-hours)"]


def _overrides(plan: Plan) -> list[str]:
    words = " ".join(plan.overrides) or "(as in the config)"
    return ["    " + line for line in textwrap.wrap(words, WIDTH - 6, break_long_words=False)]


def _strategy(plan: Plan) -> str:
    sharding = plan.config.sharding
    shared = f" N={sharding.context}" if sharding.context != plan.subject.config.sharding.context else ""
    return sharding.strategy + (" + offload" if sharding.cpu_offload else "") + shared


def _checkpointing(plan: Plan) -> str:
    mode, every = plan.config.model.activation_checkpointing, plan.config.model.checkpoint_every
    return mode + (f"/{every}" if every > 1 and mode != "none" else "")


def _wrapped(words: str, indent: str = "") -> list[str]:
    return textwrap.wrap(words, WIDTH, subsequent_indent=indent, break_long_words=False)


def gib(size: float) -> str:
    """Format bytes as GiB."""
    return f"{size / GIB:,.0f}" if size >= 999.5 * GIB else f"{size / GIB:,.1f}"


def _tokens(plan: Plan) -> str:
    """Format the tokens per second of one device, from low to high."""
    low, high = plan.speed.tokens_per_second
    if high < 10:
        return f"{low:.2g}-{high:.2g}"
    return "-".join(f"{round(value, -1 if value >= 1000 else 0):,.0f}" for value in (low, high))


def _hours(values: Iterable[float]) -> str:
    """Format a range of hours with two significant digits."""
    low, high = values
    digits = 0 if high >= 100 else 1 if high >= 1 else 2 if high >= 0.1 else 3 if high >= 0.01 else 4
    return f"{low:,.{digits}f}-{high:,.{digits}f}"
