"""The plan of a run as text of at most 100 columns."""

import textwrap
from collections.abc import Iterable, Sequence

from planner.memory import DeviceMemory, HostMemory
from planner.report import GIB, Report
from planner.search import MEMORIES, STRATEGIES, Setting, overrides
from planner.step_time import Speed
from training.description import counted

WIDTH = 100
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
        _every_setting(report) if show_all else _grid(report),
        _proposals(report),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _subject(report: Report) -> list[str]:
    shape, cluster, workload = report.subject.shape, report.cluster, report.workload
    device, worst, steps = cluster.device, workload.worst, workload.steps
    mean = sum(step.tokens for step in steps) / len(steps)
    targets = sum(step.targets for step in steps) / sum(step.tokens for step in steps)
    found = "all steps looked at" if workload.is_exact else "not all steps looked at"
    documents = f"{len(worst.lengths)} documents" if len(worst.lengths) > 1 else "1 document"
    lines = _labelled(
        "model", f"{shape.name}: {shape.num_parameters / 1e9:.2f}B parameters, {len(shape.layers)} layers"
    )
    lines += _labelled("data", report.subject.data)
    lines += _labelled(
        "plan",
        f"{counted(workload.total_steps, 'step')} of {mean:,.0f} tokens on average ({targets:.0%} of them targets), in "
        f"{_counted_range([step.micro_batches for step in steps], 'micro-batch')} on each of "
        f"{counted(cluster.devices, 'rank')}; {mean * workload.total_steps / 1e6:,.1f}M tokens in total",
    )
    lines += _labelled(
        "worst",
        f"micro-batch {worst.tokens:,} tokens in {documents}, {worst.targets:,} targets: step {worst.step + 1}, rank "
        f"{worst.rank} ({found})",
    )
    where = f" on {counted(cluster.nodes, 'node')}"
    network = f", {cluster.network / 1e9:.0f} GB/s between nodes" if cluster.nodes > 1 else ""
    lines += _labelled(
        "machine",
        f"{cluster.devices} x {device.name}{where}: {_gib(device.memory)} GiB usable, {device.flops / 1e12:.0f} TFLOP/s, "
        f"{device.bandwidth / 1e12:.2f} TB/s memory, {device.link / 1e9:.0f} GB/s to each other{network}",
    )
    for line in report.assumed:
        lines += _labelled("assumed", line)
    return lines


def _own_memory(report: Report) -> list[str]:
    own = report.found.own
    return [
        *_labelled("settings", " ".join(_described(own, report.subject.config.batch.micro_batch))),
        "",
        "Memory of the fullest GPU at the peak of a step, GiB",
        *_terms(own.memory, TERMS),
        f"  {'total':12}{_gib(own.memory.total):>8}  {_verdict(own.memory.total, report.cluster.device.memory)}",
        f"  largest batch.micro_batch that fits: {own.largest_rows or 'none'}",
    ]


def _host_and_disk(report: Report) -> list[str]:
    own, config = report.found.own, report.found.own.config
    lines = []
    if own.host.total:
        known = report.cluster.host_memory
        verdict = _verdict(own.host.total, known) if known else "of an unknown amount (--host-memory GiB)"
        lines = ["Memory of a node's host, GiB", *_terms(own.host, HOST_TERMS)]
        lines += [f"  {'total':12}{_gib(own.host.total):>8}  {verdict}"]
    lines.append(
        f"Disk: a checkpoint {_gib(report.disk.checkpoint)} GiB, a run with keep_last={config.run.keep_last} at most "
        f"{_gib(report.disk.run)} GiB, the export {_gib(report.disk.export)} GiB"
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
        f"Expected: {_tokens(speed)} tokens/s per GPU, {_hours(speed.hours)} hours, "
        f"{_hours([report.cluster.devices * hours for hours in speed.hours])} GPU-hours",
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
        lines.append(f"  {name:12}{_gib(computed):>12}{_gib(simulated):>12}{difference:>12}")
    lines.append(f"  saved activations at the end of forward: {_gib(found.saved_activations)}; {found.seconds:.0f} s")
    return lines


def _grid(report: Report) -> list[str]:
    """Strategies x optimizer memories, each with its best checkpointing: the fastest that fits, else the smallest."""
    cells: dict[tuple[str, str], list[Setting]] = {}
    for setting in report.found.settings:
        cells.setdefault((_strategy(setting), setting.config.optimizer.memory), []).append(setting)
    lines = [
        *textwrap.wrap(
            "Every strategy and optimizer.memory: GiB per GPU, checkpointing, and tokens/s per GPU. Of all kinds of "
            "checkpointing the fastest that fits, else the one that needs least; x: does not fit",
            WIDTH,
        ),
        f"  {'':18}" + "".join(f"{memory:<16}" for memory in MEMORIES),
    ]
    for strategy in sorted({name for name, _ in cells}, key=_order):
        best = [_best(cells[strategy, memory]) for memory in MEMORIES if (strategy, memory) in cells]
        lines.append(f"  {strategy:18}" + "".join(f"{_cell(setting):<16}" for setting in best))
        lines.append(f"  {'':18}" + "".join(f"{_speed_cell(setting, report):<16}" for setting in best))
    lines.append("  sel: selective; full/2, full/4: full in every 2nd, 4th layer; off: offload")
    if any(" mb" in line for line in lines):
        lines.append("  mbN: with batch.micro_batch=N, because yours does not fit")
    return [line.rstrip() for line in lines if line.strip()]


def _order(strategy: str) -> tuple[bool, int]:
    name, *offload = strategy.split(" + ")
    return bool(offload), STRATEGIES.index(name)


def _best(settings: Sequence[Setting]) -> Setting:
    fitting = [setting for setting in settings if setting.fits]
    if fitting:
        return max(fitting, key=lambda setting: setting.tokens_per_second)
    return min(settings, key=lambda setting: (not setting.fits_host, setting.memory.total))


def _cell(setting: Setting) -> str:
    return f"{_gib(setting.memory.total)} {_checkpointing(setting)}{'' if setting.fits else ' x'}"


def _speed_cell(setting: Setting, report: Report) -> str:
    if setting.fits:
        rows = setting.config.batch.rows
        return f"{setting.tokens_per_second:,.0f}/s" + (
            f" mb{rows}" if rows < report.found.own.config.batch.rows else ""
        )
    return "host too small" if setting.fits_device else ""


def _every_setting(report: Report) -> list[str]:
    lines = [
        *textwrap.wrap(
            "Every setting, the fastest first: GiB per GPU and of a node's host, the largest batch.micro_batch that fits, and "
            "tokens/s per GPU",
            WIDTH,
        ),
        f"  {'strategy':18}{'memory':8}{'checkpointing':14}{'GPU':>9}{'host':>8}{'largest':>9}{'tokens/s':>14}  fits",
    ]
    for setting in sorted(report.found.settings, key=lambda s: (-s.tokens_per_second, s.memory.total)):
        speed = _tokens(setting.speed) if setting.speed else ""
        lines.append(
            f"  {_strategy(setting):18}{setting.config.optimizer.memory:8}{_checkpointing(setting):14}"
            f"{_gib(setting.memory.total):>9}{_gib(setting.host.total):>8}{setting.largest_rows:>9}{speed:>14}  "
            f"{'yes' if setting.fits else 'no' if not setting.fits_device else 'no (host)'}"
        )
    return lines


def _proposals(report: Report) -> list[str]:
    found, base = report.found, report.subject.config
    if report.nearest:
        return _nothing_fits(report)
    assert found.cheapest
    lines = []
    if found.cheapest is found.own:
        lines.append("Your settings fit; nothing needs to change.")
    else:
        lines += ["Your settings do not fit. The cheapest that do:", *_paste(found.cheapest, report)]
    if found.faster:
        gain = found.faster.tokens_per_second / found.cheapest.tokens_per_second
        lines += [f"About {gain:.1f} times as fast, with the same precision or more:", *_paste(found.faster, report)]
    if found.lighter:
        gain = found.lighter.tokens_per_second / found.cheapest.tokens_per_second
        memory = found.lighter.config.optimizer.memory
        lines += [
            f"About {gain:.1f} times as fast with {memory}, whose rounding changes the training (docs/performance.md):",
            *_paste(found.lighter, report),
        ]
    if found.cheapest.config == base and not (found.faster or found.lighter):
        lines.append("No other setting is expected to be much faster.")
    return lines


def _paste(setting: Setting, report: Report) -> list[str]:
    """What a proposal needs, and its lines for the command line."""
    assert setting.speed
    changed = overrides(setting.config, report.subject.config)
    needs = f"{_gib(setting.memory.total)} GiB per GPU"
    needs += f", {_gib(setting.host.total)} GiB of a node's host" if setting.host.total else ""
    gpu_hours = [report.cluster.devices * hours for hours in setting.speed.hours]
    lines = [f"  ({needs}; {_tokens(setting.speed)} tokens/s per GPU, {_hours(gpu_hours)} GPU-hours)"]
    return [*lines, *_indented(" ".join(changed) or "(as in the config)")]


def _nothing_fits(report: Report) -> list[str]:
    assert report.nearest
    setting, devices, device = report.nearest.setting, report.nearest.devices, report.cluster.device
    lines = [
        "No setting fits, not even with fewer bytes per parameter. With yours, the nearest needs",
        f"  {_gib(setting.memory.total)} GiB per GPU where {_gib(device.memory)} are usable:",
        *_indented(" ".join(overrides(setting.config, report.subject.config)) or "(as in the config)"),
    ]
    if devices:
        lines.append(f"It would fit on {devices} GPUs of this kind.")
    else:
        lines.append("Not even 64 times as many GPUs of this kind would be enough.")
    if report.nearest.with_more_host:
        larger = report.nearest.with_more_host
        lines += [
            f"Or it would fit here if a node's host had {_gib(larger.host.total)} GiB of memory:",
            *_indented(" ".join(overrides(larger.config, report.subject.config))),
        ]
    return lines


def _indented(words: str) -> list[str]:
    return ["    " + line for line in textwrap.wrap(words, WIDTH - 6, break_long_words=False)]


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


def _strategy(setting: Setting) -> str:
    return setting.config.sharding.strategy + (" + offload" if setting.config.sharding.cpu_offload else "")


def _checkpointing(setting: Setting) -> str:
    mode, every = setting.config.model.activation_checkpointing, setting.config.model.checkpoint_every
    return {"selective": "sel", "offload": "off"}.get(mode, mode) + (
        f"/{every}" if every > 1 and mode != "none" else ""
    )


def _terms(memory: DeviceMemory | HostMemory, notes: dict[str, str]) -> list[str]:
    """One line for each term that is not 0."""
    return [
        f"  {name:12}{_gib(size):>8}  {notes.get(name, '')}".rstrip() for name, size in vars(memory).items() if size > 0
    ]


def _verdict(needed: int, available: int) -> str:
    rest = (available - needed) / GIB
    return f"of {_gib(available)}: " + (
        f"fits, {rest:,.1f} left" if rest >= 0 else f"does not fit, {-rest:,.1f} too much"
    )


def _labelled(label: str, words: str) -> list[str]:
    """`label` in a column of its own."""
    return textwrap.wrap(words, WIDTH, initial_indent=f"{label:10}", subsequent_indent=" " * 10, break_long_words=False)


def _gib(size: float) -> str:
    return f"{size / GIB:,.0f}" if size >= 999.5 * GIB else f"{size / GIB:,.1f}"


def _tokens(speed: Speed) -> str:
    return _range([round(value, -1 if value >= 1000 else 0) for value in speed.tokens_per_second])


def _hours(values: Iterable[float]) -> str:
    low, high = values
    digits = 0 if high >= 100 else 1 if high >= 1 else 2
    return f"{low:,.{digits}f}-{high:,.{digits}f}"


def _counted_range(values: Sequence[int], noun: str) -> str:
    low, high = min(values), max(values)
    return counted(high, noun) if low == high else f"{low:,}-{counted(high, noun)}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,.0f}" if low == high else f"{low:,.0f}-{high:,.0f}"
