"""Published rules of thumb about full fine-tuning, judged by the planner: `python scripts/plan.py --published-table`.

Every judgement follows from the numbers beside it, and these from planner/memory.py and planner/step_time.py, so that the page
that quotes them (docs/planning.md) can be made again.
"""

import dataclasses
import functools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from configs.config import Config
from planner.cluster import Cluster, cluster_of
from planner.memory import device_memory, host_memory
from planner.report import GIB
from planner.shape import ModelShape
from planner.step_time import Speed, expected_speed
from planner.subject import Assumed, Subject, from_name
from planner.workload import Workload

WIDTH = 100  # columns
MEMORIES = ("16N", "12N", "8N")
PER_NODE = 8
SEQUENCE = 4096  # tokens of each example and of a micro-batch
EXAMPLES, EPOCHS = 5000, 3
ABOUT = 0.1  # how far a figure may be off that is called "about"


@dataclass(frozen=True)
class Claim:
    """A model fits on `gpus` cards without offload and on `with_offload` with it; `hours` for 3 epochs of 5K examples."""

    model: str
    card: str  # a name that planner/cluster.py knows
    gpus: int
    with_offload: int
    hours: tuple[float, float]


# The table that is handed around, with the cards that its memory sizes stood for.
CLAIMS = (
    Claim("7B", "A100-40", 4, 2, (4, 8)),
    Claim("13B", "A100-40", 8, 4, (8, 16)),
    Claim("70B", "A100-80", 8, 4, (24, 48)),
    Claim("70B", "H100", 16, 8, (12, 24)),
)


@dataclass(frozen=True)
class Fit:
    """Bytes of one GPU without and with sharding.cpu_offload, and of a node's host with it."""

    claim: str
    memory: str
    claims_offload: bool
    without: int
    offloaded: int
    usable: int
    host: int

    @property
    def verdict(self) -> str:
        """Whether it fits as claimed."""
        if self.without <= self.usable:
            return "holds, even without offload" if self.claims_offload else "holds"
        if self.offloaded <= self.usable:
            return "holds" if self.claims_offload else "holds only with offload"
        return "does not hold"


@dataclass(frozen=True)
class Duration:
    """Hours of a run. expected: None if it does not fit. length: tokens of an example at which the claimed hours pass."""

    claim: str
    memory: str
    offload: bool
    claimed: tuple[float, float]
    expected: tuple[float, float] | None
    length: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """Whether the ranges meet."""
        if self.expected is None:
            return "does not fit"
        if self.expected[1] < self.claimed[0]:
            return "shorter than claimed"
        return "longer than claimed" if self.expected[0] > self.claimed[1] else "holds"


@dataclass(frozen=True)
class Figure:
    """A claimed number and ours. at_most: the claim is an upper bound."""

    claim: str
    claimed: float
    found: tuple[float, float]
    unit: str
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """Whether ours is within `ABOUT` of it, or below it."""
        low, high = self.found
        if self.at_most:
            return "holds" if high <= self.claimed else "may hold" if low <= self.claimed else "does not hold"
        if low > self.claimed * (1 + ABOUT):
            return "more than claimed"
        return "less than claimed" if high < self.claimed * (1 - ABOUT) else "holds"


@functools.cache
def _subject(model: str, examples: int = EXAMPLES, length: int = SEQUENCE) -> Subject:
    assumed = Assumed(SEQUENCE, examples, length, EPOCHS)
    return from_name(model, assumed, [])


def _with(config: Config, memory: str, offload: bool = False, checkpointing: str = "full") -> Config:
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, activation_checkpointing=checkpointing),
        optimizer=dataclasses.replace(config.optimizer, memory=memory),
        sharding=dataclasses.replace(config.sharding, cpu_offload=offload),
    )


def _cluster(gpus: int, card: str) -> Cluster:
    return cluster_of(gpus, -(-gpus // PER_NODE), card)


def _parts(model: str, cluster: Cluster) -> tuple[ModelShape, Config, Workload]:
    subject = _subject(model)
    return subject.shape, subject.config, subject.workloads(cluster.devices, cluster.device.kind)(1)


def fits() -> Iterator[Fit]:
    """The rows about memory."""
    for claim in CLAIMS:
        for gpus, offload in ((claim.gpus, False), (claim.with_offload, True)):
            for memory in MEMORIES:
                yield _fit(claim.model, gpus, claim.card, offload, memory)


def _fit(model: str, gpus: int, card: str, offload: bool, memory: str) -> Fit:
    cluster = _cluster(gpus, card)
    shape, config, workload = _parts(model, cluster)
    plain, moved = _with(config, memory), _with(config, memory, offload=True)
    return Fit(
        f"{model} on {gpus} x {card}{' + offload' if offload else ''}",
        memory,
        offload,
        device_memory(shape, plain, cluster, workload.worst).total,
        device_memory(shape, moved, cluster, workload.worst).total,
        cluster.device.memory,
        host_memory(shape, moved, cluster, workload.worst).total,
    )


def durations() -> Iterator[Duration]:
    """The rows about hours: without offload, or with it where nothing else fits."""
    for claim in CLAIMS:
        for memory in MEMORIES:
            yield _duration(claim, memory)


def _duration(claim: Claim, memory: str) -> Duration:
    fit = _fit(claim.model, claim.gpus, claim.card, False, memory)
    offload = fit.without > fit.usable
    if offload and fit.offloaded > fit.usable:
        return Duration(fit.claim, memory, offload, claim.hours, None, None)
    cluster = _cluster(claim.gpus, claim.card)
    shape, config, workload = _parts(claim.model, cluster)
    speed = expected_speed(shape, _with(config, memory, offload), cluster, workload)
    per_hour = [3600 * claim.gpus * tokens / (EXAMPLES * EPOCHS) for tokens in speed.tokens_per_second]
    length = claim.hours[0] * per_hour[0], claim.hours[1] * per_hour[1]
    return Duration(fit.claim, memory, offload, claim.hours, speed.hours, length)


def figures() -> Iterator[Figure]:
    """The single numbers."""
    for model, claimed in (("7B", 84.0), ("70B", 840.0)):
        for memory in ("16N", "12N", "8N"):
            shape, config, workload = _parts(model, _cluster(1, "H200"))
            found = device_memory(shape, _with(config, memory), _cluster(1, "H200"), workload.worst)
            size = (found.parameters + found.gradients + found.optimizer) / 1e9
            yield Figure(f"{model}: weights, gradients and moments at {memory}", claimed, (size, size), "GB")
    cluster = _cluster(8, "A100-80")
    shape, config, workload = _parts("7B", cluster)
    kept = [
        device_memory(shape, _with(config, "16N", checkpointing=mode), cluster, workload.worst).activations
        for mode in ("none", "full")
    ]
    yield Figure("activations without and with checkpointing, 7B", 4, (kept[0] / kept[1], kept[0] / kept[1]), "x")
    speeds = [
        expected_speed(shape, _with(config, "16N", checkpointing=mode), cluster, workload) for mode in ("none", "full")
    ]
    cost = 100 * (_middle(speeds[0]) / _middle(speeds[1]) - 1)
    yield Figure("time that checkpointing adds, 7B on 8 x A100-80", 20, (cost, cost), "%")
    yield _reports()


def _reports() -> Figure:
    """6,800 examples x 3 epochs on 8 A100 in 14 hours, for an 8B model and reports of a typical length."""
    subject, cluster = _subject("8B", 6800, 2860), _cluster(8, "A100-80")
    workload = subject.workloads(cluster.devices, "cuda")(1)
    speed = expected_speed(subject.shape, _with(subject.config, "16N"), cluster, workload)
    return Figure("6,800 examples (2,860 tokens) x 3, 8B on 8 x A100-80", 14, speed.hours, "hours", at_most=True)


def instead_of_eight() -> Iterator[Fit]:
    """ "7B on 4 x 40 GB with ZeRO-3 and CPU offload instead of 8": offload is needed only if it does not fit without."""
    for memory in MEMORIES:
        yield _fit("7B", 4, "A100-40", True, memory)


def published_table() -> str:
    """All judgements as text of at most 100 columns."""
    lines = [
        *textwrap.wrap(
            "Does it fit? sharding.strategy=full, activation_checkpointing=full, micro_batch=1, sequences of "
            f"{SEQUENCE:,} tokens. GiB per GPU without and with sharding.cpu_offload; host: GiB of a node for it",
            WIDTH,
        ),
        f"  {'claim':29}{'memory':>7}{'without':>9}{'offload':>9}{'usable':>8}{'host':>7}  verdict",
    ]
    lines += [_fit_line(fit) for fit in fits()]
    lines += ["", '"7B on 4 x 40 GB with ZeRO-3 and CPU offload, instead of 8"']
    lines += [_fit_line(fit) for fit in instead_of_eight()]
    lines += [
        "",
        *textwrap.wrap(
            f"Hours of {EPOCHS} epochs of {EXAMPLES:,} examples of {SEQUENCE:,} tokens, and tokens of an example with which "
            "the claimed hours would pass",
            WIDTH,
        ),
        f"  {'claim':19}{'memory':>7}{'claimed':>9}{'expected':>11}{'tokens':>16}  verdict",
    ]
    for row in durations():
        expected = f"{row.expected[0]:.1f}-{row.expected[1]:.1f}" if row.expected else ""
        length = f"{row.length[0]:,.0f}-{row.length[1]:,.0f}" if row.length else ""
        with_offload = " (offload)" if row.offload and row.expected else ""
        claimed = f"{row.claimed[0]:g}-{row.claimed[1]:g}"
        lines.append(
            f"  {row.claim:19}{row.memory:>7}{claimed:>9}{expected:>11}{length:>16}  {row.verdict}{with_offload}"
        )
    lines += ["", f"Single figures (about: within {ABOUT:.0%})", f"  {'claim':54}{'claimed':>9}{'ours':>10}  verdict"]
    for figure in figures():
        low, high = figure.found
        ours = f"{low:.1f}" if low == high else f"{low:.1f}-{high:.1f}"
        claimed = f"{figure.claimed:g} {figure.unit}"
        lines.append(f"  {figure.claim:54}{claimed:>9}{ours:>10}  {figure.verdict}")
    return "\n".join(lines)


def _fit_line(fit: Fit) -> str:
    return (
        f"  {fit.claim:29}{fit.memory:>7}{fit.without / GIB:>9,.1f}{fit.offloaded / GIB:>9,.1f}{fit.usable / GIB:>8.1f}"
        f"{fit.host / GIB:>7,.0f}  {fit.verdict}"
    )


def _middle(speed: Speed) -> float:
    return speed.middle
