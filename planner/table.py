"""The plan of a run as text of at most 100 columns."""

import textwrap

from planner.memory import DeviceMemory, HostMemory
from planner.report import GIB, Report
from planner.search import Setting
from planner.settings_table import every_setting, grid, proposals
from planner.words import WIDTH, counted_range, gib, hours, tokens
from training.description import counted
from training.micro_batch import largest_useful

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
    "forgetting": "the base's distributions (run.eval_general)",
}


def text(report: Report, show_all: bool = False) -> str:
    """The whole plan. show_all: every setting in place of the compact table."""
    blocks = [
        _subject(report),
        _own_memory(report),
        _host_and_disk(report),
        _time(report),
        _simulated(report),
        every_setting(report) if show_all else grid(report),
        proposals(report),
    ]
    words = "\n\n".join("\n".join(block) for block in blocks if block)
    return words if report.cluster.device.kind == "cuda" else _of_processes(words)


def _of_processes(words: str) -> str:
    """On a CPU a rank has no GPU."""
    return words.replace(TERMS["other"], "code and libraries").replace("GPU", "process")


def _subject(report: Report) -> list[str]:
    shape, cluster, workload = report.subject.shape, report.cluster, report.workload
    device, worst, steps = cluster.device, workload.worst, workload.steps
    mean = sum(step.tokens for step in steps) / len(steps)
    targets = sum(step.targets for step in steps) / sum(step.tokens for step in steps)
    found = "all steps looked at" if workload.is_exact else "not all steps looked at"
    documents = f"{len(worst.lengths)} documents" if len(worst.lengths) > 1 else "1 document"
    trained = f", {shape.num_trained / 1e6:,.1f}M of them trained (LoRA)" if shape.frozen_itemsize else ""
    size = f"{shape.num_parameters / 1e9:.2f}B parameters{trained}, {len(shape.layers)} layers"
    lines = _labelled("model", f"{shape.name}: {size}")
    lines += _labelled("data", report.subject.data)
    ranks = f"each of {cluster.devices:,} ranks" if cluster.devices > 1 else "1 rank"
    lines += _labelled(
        "plan",
        f"{counted(workload.total_steps, 'step')} of {mean:,.0f} tokens on average ({targets:.0%} of them targets), in "
        f"{counted_range([step.micro_batches for step in steps], 'micro-batch')} on {ranks}; "
        f"{mean * workload.total_steps / 1e6:,.1f}M tokens in total",
    )
    lines += _labelled(
        "worst",
        f"micro-batch {worst.tokens:,} tokens in {documents}, {worst.targets:,} targets: step {worst.step + 1}, rank "
        f"{worst.rank} ({found})",
    )
    where = f" on {counted(cluster.nodes, 'node')}"
    network = f", {cluster.network / 1e9:.0f} GB/s between nodes" if cluster.nodes > 1 else ""
    link = f", {device.link / 1e9:.3g} GB/s to each other" if cluster.devices > 1 else ""
    lines += _labelled(
        "machine",
        f"{cluster.devices} x {device.name}{where}: {gib(device.memory)} GiB usable, {device.flops / 1e12:.3g} TFLOP/s, "
        f"{device.bandwidth / 1e12:.3g} TB/s memory{link}{network}",
    )
    for line in report.assumed:
        lines += _labelled("assumed", line)
    return lines


def _own_memory(report: Report) -> list[str]:
    own, whole = report.found.own, largest_useful(report.found.own.config, report.cluster.devices)
    why = " (a rank's part of any step)" if own.largest_rows == whole else ""
    return [
        *_labelled("settings", " ".join(_described(own, report.subject.config.batch.micro_batch))),
        "",
        "Memory of the fullest GPU at the peak of a step, GiB",
        *_terms(own.memory, TERMS),
        f"  {'total':12}{gib(own.memory.total):>8}  {_verdict(own.memory.total, report.cluster.device.memory)}",
        f"  largest batch.micro_batch that fits: {own.largest_rows or 'none'}{why}",
    ]


def _host_and_disk(report: Report) -> list[str]:
    own, config = report.found.own, report.found.own.config
    lines = []
    if own.host.total:
        known = report.cluster.host_memory
        verdict = _verdict(own.host.total, known) if known else "of an unknown amount (--host-memory GiB)"
        lines = ["Memory of a node's host, GiB", *_terms(own.host, HOST_TERMS)]
        lines += [f"  {'total':12}{gib(own.host.total):>8}  {verdict}"]
    lines.append(
        f"Disk: a checkpoint {gib(report.disk.checkpoint)} GiB, a run with keep_last={config.run.keep_last} at most "
        f"{gib(report.disk.run)} GiB, the export {gib(report.disk.export)} GiB"
    )
    lines.append(f"A save: {report.save_seconds:,.0f} s at {report.save_bandwidth / 1e9:g} GB/s (--save-bandwidth)")
    return lines


def _time(report: Report) -> list[str]:
    speed = report.found.own.speed
    if speed is None:
        return []
    total = sum(speed.parts.values()) or 1.0
    parts = ", ".join(
        f"{name} {seconds / total:.0%}" for name, seconds in speed.parts.items() if seconds / total > 0.005
    )
    return [
        f"Expected: {tokens(speed)} tokens/s per GPU, {hours(speed.hours)} hours, "
        f"{hours([report.cluster.devices * one for one in speed.hours])} GPU-hours",
        *textwrap.wrap(f"Where a mean step's time goes: {parts}", WIDTH, subsequent_indent="  "),
    ]


def _simulated(report: Report) -> list[str]:
    found = report.simulated
    if found is None:
        return []
    memory = report.found.own.memory
    names = ("parameters", "gradients", "optimizer", "gathered", "reduction", "activations", "logits")
    pairs = {name: (getattr(memory, name), getattr(found, name)) for name in names}
    pairs["sum"] = (memory.tensors - memory.ewc, found.peak)
    lines = ["Both engines at the peak, GiB; the simulation has no EWC, other and headroom"]
    lines.append(f"  {'':12}{'arithmetic':>12}{'simulated':>12}{'difference':>12}")
    for name, (computed, simulated) in pairs.items():
        difference = f"{computed / simulated - 1:+.0%}" if simulated > 2**26 else ""
        lines.append(f"  {name:12}{gib(computed):>12}{gib(simulated):>12}{difference:>12}")
    lines.append(f"  saved activations at the end of forward: {gib(found.saved_activations)}; {found.seconds:.0f} s")
    return lines


def _described(setting: Setting, asked_rows: int | str) -> list[str]:
    """The settings that memory depends on, as on a command line."""
    config = setting.config
    every = config.model.checkpoint_every
    return [
        f"sharding.strategy={config.sharding.strategy}",
        *(["sharding.cpu_offload=true"] if config.sharding.cpu_offload else []),
        f"optimizer.memory={config.optimizer.memory}",
        f"model.activation_checkpointing={config.model.activation_checkpointing}",
        *([f"model.checkpoint_every={every}"] if every > 1 else []),
        f"batch.micro_batch={config.batch.micro_batch}" + (" (auto)" if asked_rows == "auto" else ""),
        f"data.sequence_length={config.data.sequence_length}",
    ]


def _terms(memory: DeviceMemory | HostMemory, notes: dict[str, str]) -> list[str]:
    """One line for each term that is not 0."""
    return [
        f"  {name:12}{gib(size):>8}  {notes.get(name, '')}".rstrip() for name, size in vars(memory).items() if size > 0
    ]


def _verdict(needed: int, available: int) -> str:
    rest = (available - needed) / GIB
    return f"of {gib(available)}: " + (
        f"fits, {rest:,.1f} left" if rest >= 0 else f"does not fit, {-rest:,.1f} too much"
    )


def _labelled(label: str, words: str) -> list[str]:
    """`label` in a column of its own."""
    return textwrap.wrap(words, WIDTH, initial_indent=f"{label:10}", subsequent_indent=" " * 10, break_long_words=False)
