"""The command of scripts/plan.py: its options, and the plan as text of at most 100 columns and as JSON."""

import argparse
import dataclasses
import os
import textwrap
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

from common.command_line import add_number, new_parser
from common.durable_files import check_can_write, write_json
from common.errors import UserError
from configs.deepspeed import from_deepspeed
from configs.load import load_config, override
from distributed.process_group import world_size_from_environment
from scripts.plan.machines import GIB, GPU_NAMES, NETWORKS, Cluster, cluster_of, generic_device, named_device
from scripts.plan.planner import (
    ASSUMED,
    SHAPES,
    STRATEGIES,
    Found,
    Plan,
    assumed_subject,
    measured,
    plan_of_run,
    read_subject,
    search,
    this_machine,
)
from training.description import counted
from training.micro_batch import largest_useful

WIDTH = 100
PER_NODE = 8  # GPUs of a node, if nobody says how many
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
HOST_TERMS = {
    "offload": "weights, gradients and moments (sharding.cpu_offload)",
    "activations": "inputs of checkpointed layers (activation_checkpointing=offload)",
    "ewc": "Fisher diagonal and reference (ewc.device=cpu)",
    "async_save": "copies of what is being written (run.async_save)",
    "data": "lists of documents while all ranks start; a token store needs none (docs/data.md)",
    "forgetting": "the base's distributions (run.eval_general)",
}
PROPOSALS = ("cheapest", "faster", "lighter", "with_more_host")
# The settings that memory depends on, beside batch.micro_batch.
SETTINGS = (
    *("sharding.strategy", "sharding.cpu_offload", "optimizer.memory", "model.activation_checkpointing"),
    *("model.checkpoint_every", "model.mlp_tiles", "sharding.context", "data.sequence_length"),
)


def text(found: Found, assumed: Iterable[str], save_bandwidth: float, show_all: bool = False) -> str:
    """The whole plan. assumed: what nobody said of the machine, in words. show_all: every setting."""
    blocks = [
        _subject(found.own, assumed),
        _memory(found.own),
        _host_and_disk(found.own, save_bandwidth),
        _time(found.own) if found.own.fits else [],
        _table(found, show_all),
        _proposals(found),
    ]
    words = "\n\n".join("\n".join(block) for block in blocks if block)
    if found.own.layout.on_cuda:
        return words
    return words.replace(TERMS["other"], "code and libraries").replace("GPU", "process")


def _subject(own: Plan, assumed: Iterable[str]) -> list[str]:
    shape, cluster, workload = own.shape, own.cluster, own.workload
    device, worst, steps = cluster.device, workload.worst, workload.steps
    trained = f", {shape.num_trained / 1e6:,.1f}M of them trained (LoRA)" if shape.frozen_itemsize else ""
    size = f"{shape.num_parameters / 1e9:.2f}B parameters{trained}, {len(shape.layers)} layers"
    targets = sum(step.targets for step in steps) / sum(step.tokens for step in steps)
    micro_batches = [step.micro_batches for step in steps]
    fewest = f"{min(micro_batches)}-" if min(micro_batches) < max(micro_batches) else ""
    looked = "all steps looked at" if workload.is_exact else "not all steps looked at"
    network = f", {cluster.network / 1e9:.0f} GB/s between nodes" if cluster.nodes > 1 else ""
    link = f", {device.link / 1e9:.3g} GB/s to each other" if cluster.devices > 1 else ""
    devices, context = cluster.devices, own.config.sharding.context
    sharing = f"each of {devices:,} ranks" if devices > 1 else "1 rank"
    if context > 1:
        sharing = f"each of {counted(devices // context, 'group')} of {context} ranks, which share its tokens"
    labelled = [
        ("model", f"{own.config.model.path}: {size}"),
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
            f"{cluster.devices} x {device.name} on {counted(cluster.nodes, 'node')}: {gib(device.memory)} GiB usable, "
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
    lines = [total + _verdict(own.memory.total, device.memory)]
    if not own.layout.on_cuda:
        least, most = own.needed
        verdict = "fits" if most <= device.memory else "may not fit" if least <= device.memory else "does not fit"
        lines = [total + "with pages of files and what the allocator keeps, a process holds"]
        lines.append(f"  {'':20}  {gib(least)} to {gib(most)} of {gib(device.memory)}: {verdict}")
    return [
        *_wrapped("settings  " + settings, " " * 10),
        "",
        "Memory of the fullest GPU at the peak of a step, GiB",
        *_terms(vars(own.memory), TERMS),
        *lines,
        f"  largest batch.micro_batch that fits: {own.largest_rows or 'none'}{why}",
    ]


def _host_and_disk(own: Plan, save_bandwidth: float) -> list[str]:
    host, disk, known, lines = sum(own.host.values()), own.disk, own.cluster.host_memory, []
    if host:
        verdict = _verdict(host, known) if known else "of an unknown amount (--host-memory GiB)"
        lines = [
            "Memory of a node's host, GiB",
            *_terms(own.host, HOST_TERMS),
            f"  {'total':12}{gib(host):>8}  {verdict}",
        ]
    save, export = disk["checkpoint"] / save_bandwidth, 2 * disk["export"] / save_bandwidth
    times = f"A save: {save:,.0f} s at {save_bandwidth / 1e9:g} GB/s (--save-bandwidth)"
    times += f"; the export: {export:,.0f} s, written and read again by one rank"
    if save > 60 * own.config.run.timeout_minutes and not own.config.run.async_save:
        times += f"; warning: raise run.timeout_minutes={own.config.run.timeout_minutes:g}, which ends a run that waits longer"
    return [
        *lines,
        f"Disk: a checkpoint {gib(disk['checkpoint'])} GiB, a run with keep_last={own.config.run.keep_last} at most "
        f"{gib(disk['run'])} GiB, the export {gib(disk['export'])} GiB",
        *_wrapped(times, "  "),
    ]


def _time(own: Plan) -> list[str]:
    speed = own.speed
    lines = [
        f"Expected: {_tokens(own)} tokens/s per GPU, {_hours(speed.hours)} hours, {_hours(own.gpu_hours)} GPU-hours"
    ]
    if own.layout.on_cuda:  # on a CPU the middle of the range says little
        total = sum(speed.parts.values())
        parts = [f"{name} {part / total:.0%}" for name, part in speed.parts.items() if part / total > 0.005]
        lines += _wrapped(f"Where a mean step's time goes: {', '.join(parts)}", "  ")
    return lines


def _table(found: Found, show_all: bool) -> list[str]:
    """One line for each strategy and optimizer.memory, with its best checkpointing; show_all: for each setting."""
    plans = sorted(found.plans, key=lambda plan: (-plan.rate, not plan.fits_host, plan.memory.total))
    what = "setting, the fastest first"
    if not show_all:
        best = {}
        for plan in plans:  # the fastest that fits, else the one that needs least
            sharding = plan.config.sharding
            spread = sharding.context, sharding.cpu_offload, STRATEGIES.index(sharding.strategy)
            best.setdefault((*spread, -plan.bytes_per_parameter), plan)
        plans = [best[key] for key in sorted(best)]
        what = "strategy and optimizer.memory with its best checkpointing (--all: every kind)"
    device = "GPU" if found.own.layout.on_cuda else "process"
    width = max(18, *(1 + len(_strategy(plan)) for plan in plans))
    lines = _wrapped(
        f"Every {what}: batch.micro_batch, or a smaller one if yours does not fit, and the largest that fits; GiB per GPU and of a "
        "node's host; tokens/s per GPU" + "; N= is sharding.context" * any(" N=" in _strategy(plan) for plan in plans)
    )
    lines.append(
        f"  {'strategy':{width}}{'memory':8}{'checkpointing':14}{'mb':>5}{'largest':>9}{device:>9}{'host':>8}{'tokens/s':>15}  fits"
    )
    for plan in plans:
        speed = _tokens(plan) if plan.fits else ""
        fits = "yes" if plan.fits else "no" if not plan.fits_device else "no (host)"
        lines.append(
            f"  {_strategy(plan):{width}}{plan.config.optimizer.memory:8}{_checkpointing(plan):14}{plan.config.batch.rows:>5}"
            f"{plan.largest_rows:>9}{gib(plan.memory.total):>9}{gib(sum(plan.host.values())):>8}{speed:>15}  {fits}"
        )
    return lines


def _proposals(found: Found) -> list[str]:
    """The cheapest setting that fits and others worth a look, as lines to paste; or what comes closest."""
    best = found.cheapest
    if best is None:
        return _nothing_fits(found)
    lines = ["Your settings fit; nothing needs to change."]
    if best is not found.own:
        lines = ["Your settings do not fit. The cheapest that do:", *_paste(best)]
    if faster := found.faster:
        lines.append(f"About {faster.rate / best.rate:.1f} times as fast, with the same precision or more:")
        lines += _paste(faster)
    if lighter := found.lighter:
        precision = f"{lighter.config.optimizer.memory}, whose rounding changes the training (docs/performance.md)"
        lines += [f"About {lighter.rate / best.rate:.1f} times as fast, with {precision}:", *_paste(lighter)]
    if best is found.own and not (faster or lighter):
        lines.append("No other setting is expected to be much faster.")
    return lines


def _nothing_fits(found: Found) -> list[str]:
    nearest, larger = found.nearest, found.with_more_host
    assert nearest
    group, what = (1, "GPUs") if nearest.layout.on_cuda else (nearest.cluster.per_node, "machines")
    lines = [
        "No setting fits, not even with fewer bytes per parameter. With yours, the nearest needs",
        f"  {gib(nearest.needed[1])} GiB per GPU where {gib(nearest.cluster.device.memory)} are usable:",
        *_overrides(nearest),
        f"It would fit on {found.devices // group} {what} of this kind."
        if found.devices
        else f"Not even 64 times as many {what} of this kind would be enough.",
    ]
    if larger:
        lines.append(f"Or it would fit here if a node's host had {gib(sum(larger.host.values()))} GiB of memory:")
        lines += _overrides(larger)
    return lines


def _paste(plan: Plan) -> list[str]:
    """What a proposal needs, and its lines for the command line."""
    host = sum(plan.host.values())
    needs = f"{gib(plan.memory.total)} GiB per GPU" + (f", {gib(host)} GiB of a node's host" if host else "")
    return [f"  ({needs}; {_tokens(plan)} tokens/s per GPU, {_hours(plan.gpu_hours)} GPU-hours)", *_overrides(plan)]


def _overrides(plan: Plan) -> list[str]:
    words = " ".join(plan.overrides) or "(as in the config)"
    return ["    " + line for line in textwrap.wrap(words, WIDTH - 6, break_long_words=False)]


def _terms(sizes: dict[str, int], notes: dict[str, str]) -> list[str]:
    """One line for each term that is not 0."""
    return [f"  {name:12}{gib(size):>8}  {notes[name]}" for name, size in sizes.items() if size > 0]


def _verdict(needed: int, available: int) -> str:
    rest = (available - needed) / GIB
    words = f"fits, {rest:,.1f} left" if rest >= 0 else f"does not fit, {-rest:,.1f} too much"
    return f"of {gib(available)}: {words}"


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
    """Bytes as GiB."""
    return f"{size / GIB:,.0f}" if size >= 999.5 * GIB else f"{size / GIB:,.1f}"


def _tokens(plan: Plan) -> str:
    """Tokens per second of one device, from low to high."""
    low, high = plan.speed.tokens_per_second
    if high < 10:
        return f"{low:.2g}-{high:.2g}"
    return "-".join(f"{round(value, -1 if value >= 1000 else 0):,.0f}" for value in (low, high))


def _hours(values: Iterable[float]) -> str:
    """Two numbers of hours, with two digits that count."""
    low, high = values
    digits = 0 if high >= 100 else 1 if high >= 1 else 2 if high >= 0.1 else 3 if high >= 0.01 else 4
    return f"{low:,.{digits}f}-{high:,.{digits}f}"


def beside(plan: Plan, measured: dict[str, float]) -> str:
    """The plan of a run beside what it measured (`scripts.plan.planner.measured`), in a line."""
    low, high = (plan.cluster.devices * value for value in plan.speed.tokens_per_second)
    speed, peak = measured["tokens_per_second"], measured["memory_gib"]
    least, most = (plan.memory.tensors, plan.memory.tensors) if plan.layout.on_cuda else plan.needed
    memory = gib(most) if least == most else f"{gib(least)} to {gib(most)}"
    off = f" ({most / GIB / peak - 1:+.0%})" if least == most else ""
    where = "in" if low <= speed <= high else "outside of"
    return (
        f"planned against measured ({measured['steps']:,} steps): peak memory {memory} and {peak:.1f} GiB{off}; {low:,.0f} to "
        f"{high:,.0f} and {speed:,.0f} tokens/s, {where} the range"
    )


def as_json(found: Found, assumed: Iterable[str], save_bandwidth: float) -> dict[str, Any]:
    """Everything in bytes, seconds and hours."""
    own = found.own
    return {
        "config": dataclasses.asdict(own.subject.config),
        "model": {
            "name": own.config.model.path,
            "parameters": own.shape.num_parameters,
            "trained": own.shape.num_trained,
        },
        "data": own.subject.lines,
        "cluster": dataclasses.asdict(own.cluster),
        "assumed": list(assumed),
        "workload": dataclasses.asdict(own.workload),
        "own": _plan_json(own),
        "settings": [_plan_json(plan) for plan in found.plans],
        "proposals": {name: _plan_json(getattr(found, name)) for name in PROPOSALS},
        "nearest": found.nearest and {"setting": _plan_json(found.nearest), "devices": found.devices},
        "disk": own.disk,
        "save_seconds": own.disk["checkpoint"] / save_bandwidth,
    }


def _plan_json(plan: Plan | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    return {
        "overrides": plan.overrides,
        "micro_batch": plan.config.batch.rows,
        "memory": vars(plan.memory) | {"total": plan.memory.total},
        "needed": plan.needed,
        "host": plan.host | {"total": sum(plan.host.values())},
        "fits": plan.fits,
        "fits_device": plan.fits_device,
        "fits_host": plan.fits_host,
        "largest_micro_batch": plan.largest_rows,
        "speed": dataclasses.asdict(plan.speed) | {"gpu_hours": plan.gpu_hours} if plan.fits else None,
    }


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Parse sys.argv."""
    parser = new_parser(description)
    add = parser.add_argument
    add("what", nargs="*", metavar="CONFIG or section.key=value", help="a config, and settings that replace its own")
    add("--deepspeed", metavar="FILE", help="apply the settings of a DeepSpeed JSON file to the config")
    machine = parser.add_argument_group("the machine")
    add = machine.add_argument
    add_number(machine, "--gpus", "GPUs of all nodes together", 8)
    add_number(machine, "--nodes", f"nodes (as many as {PER_NODE} GPUs a node need)")
    add("--gpu", metavar="NAME", help=f"one of {', '.join(GPU_NAMES)}, or the name CUDA gives it")
    add_number(machine, "--gpu-memory", "of the data sheet (that of --gpu, or 80)", kind=float, metavar="GB")
    add("--network", metavar="NAME|Gb/s", help=f"a node's cards together: a number or one of {', '.join(NETWORKS)}")
    add_number(machine, "--host-memory", "of a node's host", kind=float, metavar="GiB")
    add_number(machine, "--save-bandwidth", "of the disk", 1.0, metavar="GB/s")
    add("--here", action="store_true", help="this machine and torchrun's ranks, or one: as train.py --dry-run")
    instead = parser.add_argument_group("in place of a config")
    instead.add_argument("--model", help=f"{', '.join(SHAPES)}, a directory with a config.json, or an id on the hub")
    for name, (value, words) in ASSUMED.items():
        add_number(instead, "--" + name.replace("_", "-"), f"{words} ({value or 'as --sequence'})", metavar="N")
    add = parser.add_argument_group("output").add_argument
    add("--all", action="store_true", help="list every setting, and not only the best of each strategy and memory")
    add("--json", type=Path, metavar="FILE", help="write everything to FILE as well")
    against = "only compare the plan with the metrics of this run of the config, on the machine that it ran on"
    add("--against", type=Path, metavar="runs/NAME", help=against)
    return parser.parse_intermixed_args()


def check_numbers(arguments: argparse.Namespace) -> dict[str, int]:
    """The options that go with --model and were given. Raises UserError for a number that makes no sense."""
    given = {name: value for name in ASSUMED if (value := getattr(arguments, name)) is not None}
    for name in ("gpus", "nodes", "gpu_memory", "host_memory", "save_bandwidth", *given):
        value, option = getattr(arguments, name), "--" + name.replace("_", "-")
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{option} {value:g} must be above 0")
        if name in given and not arguments.model:
            raise UserError(
                f"{option} goes with --model; a config says it itself (section.key=value replaces a setting)"
            )
    if arguments.model and (arguments.deepspeed or arguments.against or arguments.here):
        raise UserError("--deepspeed, --against and --here go with a config, not with --model")
    if not (arguments.model or arguments.what):
        raise UserError(f"name a config, e.g. configs/xbrl.py, or a model: --model with one of {', '.join(SHAPES)}")
    return given


def described_cluster(arguments: argparse.Namespace) -> tuple[Cluster, list[str]]:
    """The machine that the options describe, and what was assumed of it. Raises UserError."""
    gpu, gigabytes = arguments.gpu, arguments.gpu_memory
    device, assumed = named_device(gpu) if gpu else generic_device(gigabytes or 80), []
    if gpu and gigabytes:
        device = dataclasses.replace(device, memory=generic_device(gigabytes).memory)
    nodes, host_memory = arguments.nodes or -(-arguments.gpus // PER_NODE), int((arguments.host_memory or 0) * GIB)
    cluster = cluster_of(arguments.gpus, nodes, device, arguments.network, host_memory)
    if not gpu:
        assumed.append(f"speeds of a card of that memory (--gpu NAME knows {', '.join(GPU_NAMES[:6])} and others)")
    if arguments.nodes is None and nodes > 1:
        assumed.append(f"{nodes} nodes of {cluster.per_node} GPUs (--nodes)")
    return cluster, assumed


def main(description: str | None = None) -> int:
    """Print the plan that sys.argv asks for. Returns the exit code; raises UserError."""
    arguments = parse_arguments(description)
    if arguments.here and int(os.environ.get("RANK", 0)):
        return 0  # rank 0 plans for all
    given, bandwidth = check_numbers(arguments), arguments.save_bandwidth * 1e9
    if arguments.json:
        check_can_write(arguments.json, "--json")
    cluster, assumed = described_cluster(arguments)
    if arguments.model:
        subject = assumed_subject(arguments.model, arguments.what, cluster, **given)
    else:
        path, *overrides = arguments.what
        if arguments.deepspeed:
            ranks = world_size_from_environment()[0] if arguments.here else cluster.devices
            config = override(from_deepspeed(load_config(path), arguments.deepspeed, ranks)[0], overrides)
        else:
            config = load_config(path, overrides)
        if arguments.against:
            print(beside(plan_of_run(config, arguments.against), measured(arguments.against)))
            return 0
        if arguments.here:
            (config, cluster), assumed = this_machine(config), []
        subject = read_subject(config, cluster)
    found = search(subject)
    print(text(found, assumed, bandwidth, arguments.all))
    if arguments.json:
        write_json(arguments.json, as_json(found, assumed, bandwidth))
        print(f"\nwrote {arguments.json}")
    return 0
