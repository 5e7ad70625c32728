"""The search for settings of a run that fit, and for the cheapest setting.

Weights and moments in bf16 change the training; no other setting here does. So the cheapest setting is defined as:

1. The user's own setting, if it fits.
2. Else the fastest setting that fits and stores at least as many bytes per parameter as the user's. Of settings within 1%
   of the fastest, the setting with the least memory is taken. If none fits without `sharding.cpu_offload`,
   `sharding.context` is doubled, up to three times.
3. Else the same with 14N, then 12N, 8N and 6N: precision is given up last.

Settings with `sharding.cpu_offload` are tried only if the user asks for it or no other setting of the user's precision fits. In
this case the search also plans LoRA, and the largest smaller model whose weights can all be trained (scripts/plan/models.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from itertools import product

from transformers import PretrainedConfig

from common.errors import UserError
from configs.config import Config
from configs.load import replace
from model.rope import check_length
from scripts.plan.machines import PER_NODE, Cluster
from scripts.plan.models import smaller_models
from scripts.plan.planner import Plan, accepted_rows, is_accepted, plan_setting
from scripts.plan.subject import Subject
from scripts.plan.workload import Workload
from training.micro_batch import largest_useful, with_rows

STRATEGIES = ("full", "grad_op", "hybrid", "none")
MEMORIES = ("16N", "14N", "12N", "8N", "6N")
# (model.activation_checkpointing, model.checkpoint_every), the least recomputation first
CHECKPOINTING = (("none", 1), ("selective", 1), ("full", 4), ("full", 2), ("full", 1), ("offload", 1))
AS_FAST = 0.99  # a setting counts as equally fast from this fraction of the fastest one's speed
WORTH_IT = 1.05  # another setting is proposed if it is so many times as fast
WORTH_THE_PRECISION = 1.25  # a setting with fewer bytes per parameter must be so many times as fast
LORA_RANK = 64


@dataclass(frozen=True)
class SearchResult:
    """The user's setting, all candidates, and the proposals.

    `faster` has at least the bytes per parameter of `cheapest`, `lighter` has fewer. If nothing fits, `nearest` needs the
    least memory, and `devices` is the number of devices that hold it, or None if 64 times as many do not. `lora` and `smaller`
    train less without offload and with the user's bytes per parameter; they are None if full training fits in this way. `lora`
    may not fit either; then it needs the least memory of its kind.
    """

    own: Plan
    plans: list[Plan]
    cheapest: Plan | None = None
    faster: Plan | None = None
    lighter: Plan | None = None
    nearest: Plan | None = None
    devices: int | None = None
    lora: Plan | None = None
    smaller: Plan | None = None


def search(subject: Subject) -> SearchResult:
    """Plan the user's setting and all candidates, and choose the proposals."""
    config = subject.config
    own, plans = _plans(subject)
    if _fits_precisely(own, plans):
        return _chosen(own, plans)
    for context in () if config.sharding.cpu_offload else contexts(subject):
        shared = replace(config, "sharding.context", context)
        plans += [plan_setting(subject, offloading) for offloading in candidates(shared, subject.cluster, True)]
    return replace_fields(_chosen(own, plans), lora=_lora(subject), smaller=_smaller_model(subject))


def _plans(subject: Subject) -> tuple[Plan, list[Plan]]:
    """Return the plan of the user's setting, and of all candidates that offload no more than it does."""
    config, plans = subject.config, list[Plan]()
    own = plan_setting(subject, config, as_written=True)
    for context in contexts(subject):
        shared = replace(config, "sharding.context", context)
        for offload in sorted({False, config.sharding.cpu_offload}):
            plans += [plan_setting(subject, candidate) for candidate in candidates(shared, subject.cluster, offload)]
        if _fits_precisely(own, plans):
            break
    return own, plans


def _fits_precisely(own: Plan, plans: list[Plan]) -> bool:
    """Return whether a setting fits with at least the bytes per parameter of the user's."""
    return own.fits or any(plan.fits and plan.bytes_per_parameter >= own.bytes_per_parameter for plan in plans)


def _lora(subject: Subject) -> Plan | None:
    """Return the run with LoRA, which may not fit; None if the run has LoRA, or its settings exclude LoRA."""
    config = subject.config
    with_lora = replace(replace(config, "lora.rank", LORA_RANK), "optimizer.learning_rate", "auto")
    plans = [] if config.lora.rank else _leaner(subject, with_lora, subject.shape.config)
    return next((plan for plan in plans if plan.fits), plans[-1] if plans else None)


def _smaller_model(subject: Subject) -> Plan | None:
    """Return the run with the largest known model that is smaller and fits, of the same type if any does; None with LoRA."""
    config, cluster, shape = subject.config, subject.cluster, subject.shape
    bytes_per_parameter = int(config.optimizer.memory.removesuffix("N"))
    models = () if config.lora.rank else smaller_models(shape.num_parameters, shape.config.model_type)
    for name, num_parameters, model_config in models:
        if num_parameters * bytes_per_parameter > cluster.devices * cluster.device.memory:
            continue
        try:
            check_length(config.data.length, model_config, name)
        except UserError:
            continue
        for plan in _leaner(subject, replace(config, "model.path", name), model_config):
            if plan.fits:
                return plan
    return None


def _leaner(subject: Subject, config: Config, model_config: PretrainedConfig) -> list[Plan]:
    """Return the plans of another config or model with the user's settings, and with the leanest without offload."""
    if not subject.with_model:
        return []
    sharding = replace_fields(config.sharding, strategy="full", shard_size=None)
    leanest = replace_fields(replace(config, "model.activation_checkpointing", "full"), sharding=sharding)
    rows = config.batch.micro_batch if isinstance(config.batch.micro_batch, int) else 1
    settings = (with_rows(config, rows), with_rows(leanest, 1))
    changed = subject.with_model(config, model_config)
    return [Plan(changed, setting) for setting in settings if is_accepted(setting, subject.cluster)]


def _chosen(own: Plan, plans: list[Plan]) -> SearchResult:
    """Choose the proposals among the user's setting and the candidates."""
    fitting = [plan for plan in plans if plan.fits]
    if not fitting and not own.fits:
        return _nothing_fits(own, plans)
    cheapest = own
    if not own.fits:
        most_bytes = max(plan.bytes_per_parameter for plan in fitting)
        cheapest = _fastest(fitting, at_least=min(own.bytes_per_parameter, most_bytes))
    faster = _fastest(fitting, at_least=cheapest.bytes_per_parameter)
    if faster.rate < WORTH_IT * cheapest.rate:
        faster = None
    fast_enough = WORTH_THE_PRECISION * (faster or cheapest).rate
    fewer_bytes = sorted({plan.bytes_per_parameter for plan in fitting}, reverse=True)
    lighter = (
        _fastest([plan for plan in fitting if plan.bytes_per_parameter == size])
        for size in fewer_bytes
        if size < cheapest.bytes_per_parameter
    )
    return SearchResult(
        own, plans, cheapest, faster, next((plan for plan in lighter if plan.rate >= fast_enough), None)
    )


def contexts(subject: Subject) -> list[int]:
    """Return the user's `sharding.context`, and twice to 8 times as many if the model and the run accept them."""
    config, heads = subject.config, subject.shape.config.num_attention_heads
    own, *more = (factor * config.sharding.context for factor in (1, 2, 4, 8))
    configs = {context: replace(config, "sharding.context", context) for context in more if heads % context == 0}
    return [own, *(context for context, shared in configs.items() if is_accepted(shared, subject.cluster))]


def candidates(config: Config, cluster: Cluster, offload: bool) -> list[Config]:
    """Return every combination that differs on this cluster and with which a run starts, with `sharding.cpu_offload=offload`.

    The user's config is the first if it has this `sharding.cpu_offload`.
    """
    own, on_cuda = config.sharding, cluster.device.kind == "cuda"
    differs_from_full = {"full": True, "hybrid": cluster.nodes > 1}
    configs = [config] if offload == own.cpu_offload else []
    for strategy, memory, (mode, every) in product(STRATEGIES, MEMORIES, CHECKPOINTING):
        if strategy != own.strategy and not differs_from_full.get(strategy, cluster.devices > 1):
            continue
        if not on_cuda and (offload != own.cpu_offload or mode == "offload"):
            continue
        sharding = replace_fields(
            own,
            strategy=strategy,
            cpu_offload=offload,
            shard_size=own.shard_size if strategy == "hybrid" else None,
            reduce_dtype="fp32" if strategy in ("hybrid", "none") else own.reduce_dtype,
        )
        optimizer = replace_fields(config.optimizer, memory=memory)
        model = replace_fields(config.model, activation_checkpointing=mode, checkpoint_every=every)
        candidate = replace_fields(config, model=model, optimizer=optimizer, sharding=sharding)
        if candidate != config and is_accepted(candidate, cluster):
            configs.append(candidate)
    return configs


def _fastest(plans: Iterable[Plan], at_least: int = 0) -> Plan:
    """Return the fastest plan with `at_least` bytes per parameter, after its micro-batch is enlarged where that pays.

    Among plans that are equally fast, prefer the smallest `sharding.context`, then the least memory. The fastest plan of
    every kind of checkpointing, offload and context is enlarged, because a kind that copies and gathers much is slow with
    the user's micro-batch and gains the most from a larger one.
    """
    fastest_by_kind: dict[tuple, Plan] = {}
    for plan in sorted(plans, key=lambda plan: plan.rate):
        if plan.bytes_per_parameter >= at_least:
            model, layout = plan.config.model, plan.layout
            kind = model.activation_checkpointing, model.checkpoint_every, layout.offloads, layout.context
            fastest_by_kind[kind] = plan
    enlarged = [_with_larger_rows(plan) for plan in fastest_by_kind.values()]
    fast_enough = AS_FAST * max(plan.rate for plan in enlarged)
    equally_fast = [plan for plan in enlarged if plan.rate >= fast_enough]
    return min(equally_fast, key=lambda plan: (plan.layout.context, plan.memory.total))


def _with_larger_rows(plan: Plan) -> Plan:
    """Return the plan with a larger micro-batch if that is faster: fewer micro-batches gather the parameters less often."""
    best, cluster, config, rows = plan, plan.cluster, plan.config, plan.config.batch.rows
    at_most = min(plan.largest_rows, largest_useful(config, cluster.devices))
    while max(step.micro_batches for step in plan.subject.workload_of(rows, config.sharding.context).steps) > 1:
        more = accepted_rows(config, range(rows + 1, at_most + 1), cluster)
        if not more:
            break
        rows = next((count for count in more if count >= 2 * rows), more[-1])
        larger = Plan(plan.subject, with_rows(config, rows), plan.largest_rows)
        if larger.rate >= WORTH_IT * best.rate:
            best = larger
    return best


def _nothing_fits(own: Plan, plans: list[Plan]) -> SearchResult:
    """Return the setting that needs the least memory with the user's bytes per parameter, and how many devices hold it."""
    precise = [plan for plan in plans if plan.bytes_per_parameter >= own.bytes_per_parameter]
    nearest = min(precise, key=lambda plan: plan.memory.total)
    # More devices change the part of the model that each holds. The micro-batch is taken to stay the same.
    same = Workload(1, [], nearest.workload.worst, True)
    cluster = own.cluster
    for factor in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        devices = factor * cluster.devices
        # A node is filled with GPUs first, then nodes are added. A CPU has no room for more processes.
        is_full = cluster.nodes > 1 or cluster.per_node >= PER_NODE or cluster.device.kind == "cpu"
        per_node = cluster.per_node if is_full else min(PER_NODE, devices)
        nodes = -(-devices // per_node)
        larger = replace_fields(cluster, devices=nodes * per_node, nodes=nodes)
        subject = replace_fields(own.subject, cluster=larger, workload_of=lambda rows, context: same)
        if any(Plan(subject, plan.config).fits for plan in precise):
            return SearchResult(own, plans, nearest=nearest, devices=larger.devices)
    return SearchResult(own, plans, nearest=nearest)
