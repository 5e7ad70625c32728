"""All settings of a plan as a table, and what is proposed."""

import textwrap
from collections.abc import Sequence

from planner.report import Report
from planner.search import MEMORIES, STRATEGIES, Setting, overrides
from planner.words import WIDTH, gib, hours, tokens


def grid(report: Report) -> list[str]:
    """Strategies x optimizer memories, each with its best checkpointing: the fastest that fits, else the smallest."""
    cells: dict[tuple[str, str], list[Setting]] = {}
    for setting in report.found.settings:
        cells.setdefault((_strategy(setting), setting.config.optimizer.memory), []).append(setting)
    device = "GPU" if report.cluster.device.kind == "cuda" else "process"
    lines = [
        *textwrap.wrap(
            f"Every strategy and optimizer.memory: GiB per {device}, checkpointing, and tokens/s per {device}. Of all kinds of "
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
    return f"{gib(setting.memory.total)} {_checkpointing(setting)}{'' if setting.fits else ' x'}"


def _speed_cell(setting: Setting, report: Report) -> str:
    if setting.fits:
        rows = setting.config.batch.rows
        return f"{setting.tokens_per_second:,.0f}/s" + (
            f" mb{rows}" if rows < report.found.own.config.batch.rows else ""
        )
    return "host too small" if setting.fits_device else ""


def every_setting(report: Report) -> list[str]:
    """One line for each."""
    lines = [
        *textwrap.wrap(
            "Every setting, the fastest first: GiB per GPU and of a node's host, the largest batch.micro_batch that fits, and "
            "tokens/s per GPU",
            WIDTH,
        ),
        f"  {'strategy':18}{'memory':8}{'checkpointing':14}{'GPU':>9}{'host':>8}{'largest':>9}{'tokens/s':>14}  fits",
    ]
    for setting in sorted(report.found.settings, key=lambda s: (-s.tokens_per_second, s.memory.total)):
        speed = tokens(setting.speed) if setting.speed else ""
        lines.append(
            f"  {_strategy(setting):18}{setting.config.optimizer.memory:8}{_checkpointing(setting):14}"
            f"{gib(setting.memory.total):>9}{gib(setting.host.total):>8}{setting.largest_rows:>9}{speed:>14}  "
            f"{'yes' if setting.fits else 'no' if not setting.fits_device else 'no (host)'}"
        )
    return lines


def proposals(report: Report) -> list[str]:
    """The cheapest setting that fits and others worth a look, as lines to paste; or what comes closest."""
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
    needs = f"{gib(setting.memory.total)} GiB per GPU"
    needs += f", {gib(setting.host.total)} GiB of a node's host" if setting.host.total else ""
    gpu_hours = [report.cluster.devices * one for one in setting.speed.hours]
    lines = [f"  ({needs}; {tokens(setting.speed)} tokens/s per GPU, {hours(gpu_hours)} GPU-hours)"]
    return [*lines, *_indented(" ".join(changed) or "(as in the config)")]


def _nothing_fits(report: Report) -> list[str]:
    assert report.nearest
    setting, devices, device = report.nearest.setting, report.nearest.devices, report.cluster.device
    lines = [
        "No setting fits, not even with fewer bytes per parameter. With yours, the nearest needs",
        f"  {gib(setting.memory.total)} GiB per GPU where {gib(device.memory)} are usable:",
        *_indented(" ".join(overrides(setting.config, report.subject.config)) or "(as in the config)"),
    ]
    if devices:
        lines.append(f"It would fit on {devices} GPUs of this kind.")
    else:
        lines.append("Not even 64 times as many GPUs of this kind would be enough.")
    if report.nearest.with_more_host:
        larger = report.nearest.with_more_host
        lines += [
            f"Or it would fit here if a node's host had {gib(larger.host.total)} GiB of memory:",
            *_indented(" ".join(overrides(larger.config, report.subject.config))),
        ]
    return lines


def _indented(words: str) -> list[str]:
    return ["    " + line for line in textwrap.wrap(words, WIDTH - 6, break_long_words=False)]


def _strategy(setting: Setting) -> str:
    return setting.config.sharding.strategy + (" + offload" if setting.config.sharding.cpu_offload else "")


def _checkpointing(setting: Setting) -> str:
    mode, every = setting.config.model.activation_checkpointing, setting.config.model.checkpoint_every
    return {"selective": "sel", "offload": "off"}.get(mode, mode) + (
        f"/{every}" if every > 1 and mode != "none" else ""
    )
