"""The time model: its errors against published runs, its terms one by one, and the effect of faster machines."""

import dataclasses
from functools import cache
from types import SimpleNamespace

import pytest

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from configs.load import override
from model.flops import step_flops
from model.language_model import build_on_meta
from model.memory import ModelShape, Unit, shape_of
from scripts.plan.machines import Cluster, cluster_of, cpu_cluster
from scripts.plan.models import named_config
from scripts.plan.step_time import (
    ASSUMPTIONS,
    LOCAL_LATENCY,
    NODE_LATENCY,
    Speed,
    StepWork,
    _Run,
    expected_speed,
    layer_elements,
    share_of_tiles,
)
from tests.scripts.plan import published

MIDDLE = ASSUMPTIONS["cuda"][1]
CONFIG = Config(Model("m"), Data(("a",)), Batch(global_examples=64), Optimizer(learning_rate=1e-5), Run("x"))


@cache
def shape(name: str) -> ModelShape:
    return published.shape_of_equal_layers(named_config(name))


def settings(**changes: object) -> Config:
    """Return the config with `section__key` changed."""
    return override(CONFIG, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


def step(
    model: str, lengths: list[int], micro_batches: int = 1, targets: float | None = None, balance: float = 1.0
) -> StepWork:
    targets = float(sum(lengths)) if targets is None else targets
    flops = step_flops(shape(model).work, lengths, targets)
    return StepWork(0, sum(lengths), targets, flops, micro_batches, balance)


def speed(model: str = "7B", cluster: Cluster | None = None, work: StepWork | None = None, **changes: object) -> Speed:
    cluster = cluster or cluster_of(8, 1, "H100")
    work = work or step(model, [4096] * 2 * cluster.devices)
    return expected_speed(shape(model), settings(**changes), cluster, [work], total_steps=100)


def test_equal_steps_are_computed_once(monkeypatch):
    few, many = step("135M", [100] * 8), step("135M", [300] * 8)
    steps, seen = [dataclasses.replace(work, step=i) for i, work in enumerate((few, many, few, few))], []
    computed = _Run.parts
    monkeypatch.setattr(_Run, "parts", lambda run, work: seen.append(work.tokens) or computed(run, work))
    machine = shape("135M"), settings(), cluster_of(8, 1, "H100")
    mean = expected_speed(*machine, steps, 100)
    assert sorted(seen) == [800] * 3 + [2400] * 3  # slow, middle and fast
    seconds = [sum(expected_speed(*machine, [work], 100).parts.values()) for work in (few, many)]
    assert sum(mean.parts.values()) == pytest.approx((3 * seconds[0] + seconds[1]) / 4)


# Rows of -> rows, median error in %, share inside the range in %: the table of docs/planning.md, of held-out rows
STATED = {"all": (137, 2.2, 98), "A100": (79, 3.1, 96), "H100, H200": (56, 1.8, 100)}


def test_shape_from_one_layer_equals_the_whole():
    config = named_config("135M")
    short, real = shape("135M"), shape_of(build_on_meta(config), config)
    names = [field.name for field in dataclasses.fields(real) if field.name != "config"]
    assert [getattr(short, name) for name in names] == [getattr(real, name) for name in names]


def test_errors_of_held_out_rows_are_as_stated():
    rows = [row for row in published.published_rows() if row.role == "held_out"]
    bands = published.bands(rows)
    for name, stated in STATED.items():
        assert (bands[name].rows, round(100 * bands[name].median, 1), round(100 * bands[name].inside)) == stated
    elsewhere = published.band([row for row in rows if row.framework != "llm-foundry"])
    assert (elsewhere.rows, round(100 * elsewhere.median, 1), round(100 * elsewhere.inside)) == (30, 3.7, 93)
    for row in rows:
        low, high = published.predicted(row).tokens_per_second
        assert low < published.predicted(row).middle < high < 2.4 * low, row  # a range, not a shrug


def test_constants_are_the_best_for_fitted_rows():
    rows = [row for row in published.published_rows() if row.role == "fit"]
    band, values = published.band(rows), published.constants()
    assert (band.rows, round(100 * band.median, 1), round(100 * band.inside)) == (117, 3.5, 98)
    best = published.loss(rows, values)
    for name, value in values.items():
        for factor in (1.15, 1 / 1.15):
            moved = value * factor
            assert moved > published.LIMITS.get(name, 10) or published.loss(rows, values | {name: moved}) > best, name
    # Neither too fast nor too slow as a whole, and every term is needed.
    assert abs(band.bias) < 0.01
    for part in ("attention", "memory", "communication"):
        without = [
            row.published * (1 - published.predicted(row).parts[part] / sum(published.predicted(row).parts.values()))
            / published.predicted(row).middle - 1
            for row in rows
        ]  # fmt: skip
        assert sum(map(abs, without)) > 1.2 * sum(abs(published.error(row)) for row in rows), part


@pytest.mark.parametrize("strategy", ["full", "grad_op", "hybrid", "none"])
@pytest.mark.parametrize("changed", ["flops", "bandwidth", "link", "host_link", "network"])
@pytest.mark.parametrize(("model", "length"), [("7B", 2048), ("1B", 64)])  # the second one waits for Python
def test_faster_machine_is_never_slower(strategy: str, changed: str, model: str, length: int):
    cluster = cluster_of(16, 2, "A100-80", 200)
    if changed == "network":
        faster = dataclasses.replace(cluster, network=2 * cluster.network)
    else:
        device = dataclasses.replace(cluster.device, **{changed: 2 * getattr(cluster.device, changed)})
        faster = dataclasses.replace(cluster, device=device)
    options = {
        "sharding__strategy": strategy,
        "sharding__cpu_offload": True,
        "model__activation_checkpointing": "offload",
    }
    before, after = (speed(model, machine, step(model, [length] * 64, 4), **options) for machine in (cluster, faster))
    for now, then in zip(
        (after.middle, *after.tokens_per_second), (before.middle, *before.tokens_per_second), strict=True
    ):
        assert now > (1 - 1e-9) * then
    is_seen = changed in ("bandwidth", "host_link") or (changed == "flops" and strategy in ("hybrid", "none"))
    if is_seen and model == "7B":
        assert after.middle > 1.001 * before.middle


def test_slow_network_shows_the_bytes_of_rings():
    """If the network is so slow that it hides the computation, the seconds follow from the bytes alone."""
    parameters, units, link = shape("7B").num_parameters, 35, MIDDLE.link  # units: 32 layers, embedding, head, root
    slow = cluster_of(16, 2, "H100", 1.0)
    work = step("7B", [256] * 16)

    def seconds(**changes: object) -> float:
        run = speed("7B", slow, work, **changes)
        computing = run.parts["products"] + run.parts["attention"] + run.parts["memory"]
        return run.parts["communication"] + (1 - MIDDLE.contention) * computing

    rate, latency = slow.network * link, LOCAL_LATENCY + NODE_LATENCY
    gathers = 2 - 2 * 32000 * 4096 / parameters  # the head and the embedding are gathered once, the layers twice
    once = parameters * 15 / 16 / rate
    close = {"rel": 0.01}
    assert seconds() == pytest.approx((2 * gathers + 4) * once + (gathers + 1) * units * latency, **close)
    assert seconds(sharding__reduce_dtype="bf16") == pytest.approx((2 * gathers + 2) * once, **close)
    assert seconds(sharding__strategy="grad_op") == pytest.approx((2 + 4) * once, **close)
    assert seconds(sharding__strategy="none") == pytest.approx(2 * 4 * once, **close)
    # Each of the 8 GPUs of a node reduces an eighth of the gradients over the network that they share, there and back.
    assert seconds(sharding__strategy="hybrid") == pytest.approx(2 * 4 * parameters / 2 / rate, **close)


def test_head_costs_per_target_attention_per_pair():
    everything, few = (speed("8B", work=step("8B", [4096] * 16, targets=n)) for n in (4096.0 * 16, 1000.0))
    work = shape("8B").work
    ratio = (work.per_token * 65536 + work.per_target * 1000) / ((work.per_token + work.per_target) * 65536)
    assert few.parts["products"] / everything.parts["products"] == pytest.approx(ratio)
    assert few.parts["memory"] < everything.parts["memory"]
    short = speed("8B", work=step("8B", [256] * 256))
    # A sixteenth of the pairs; of the block of 128 on the diagonal both halves are computed.
    ratio = everything.parts["attention"] / short.parts["attention"]
    assert ratio == pytest.approx(16 * (1 + 128 / 4096) / (1 + 128 / 256), rel=0.01)


def test_waiting_offload_and_small_micro_batches_cost_time():
    even, uneven = (speed(work=step("7B", [4096] * 16, balance=b)) for b in (1.0, 0.5))
    computing = sum(even.parts[part] for part in ("products", "attention", "memory"))
    assert even.parts["balance"] == 0
    assert uneven.parts["balance"] == pytest.approx(computing)

    offloaded = speed(sharding__cpu_offload=True)
    local = shape("7B").num_parameters / 8
    gathered = 4 * (2 - 2 * 32000 * 4096 / shape("7B").num_parameters)  # fp32 weights, there for each gather
    copied = local * (gathered + 4) / 50e9
    adamw = local * (2 * 4 + 2 * 4 + 2 * 8) / MIDDLE.host
    assert offloaded.parts["offload"] == pytest.approx(copied + adamw)
    assert offloaded.parts["optimizer"] == 0 < even.parts["optimizer"]
    kept = speed(model__activation_checkpointing="offload").parts["offload"]
    assert kept == pytest.approx(2 * 2 * 8192 * 4096 * 32 / 50e9)

    large, small = (speed(work=step("7B", [1024] * 64, count)) for count in (1, 8))
    assert small.middle < 0.9 * large.middle
    # Kernels of a tiny model run faster than Python starts them.
    tiny = speed("135M", cluster_of(1, 1, "H100"), step("135M", [256]))
    assert tiny.parts["host"] > 0.5 * sum(tiny.parts.values())


def test_elementwise_and_optimizer_bytes_follow_the_code():
    # Llama 2 7B, in units of the hidden size 4096: 38 + RoPE 20 + attention 4, and 5 for each intermediate element.
    config = shape("7B").config
    assert layer_elements(config, False) == 4096 * 62 + 5 * 11008
    assert layer_elements(config, True) == 4096 * (8 + 4 + 4) + 3 * 11008
    assert speed(model__compute_dtype="fp32").parts["products"] > 14 * speed().parts["products"]
    # AdamW reads and writes weight, gradient and moments; a tensor that is not fp32 is converted in a buffer of 4 bytes.
    updates = {memory: speed(optimizer__memory=memory).parts["optimizer"] for memory in ("16N", "14N", "12N", "8N")}
    per_parameter = {memory: seconds / updates["16N"] * 32 for memory, seconds in updates.items()}
    assert per_parameter == pytest.approx({"16N": 32, "14N": 28 + 16, "12N": 24 + 24, "8N": 16 + 56})


def test_tiles_and_experts_in_the_time() -> None:
    """Tiles compute two of the MLP's three products again, and all products of experts. A token counts at its experts only."""
    llama = shape("7B")
    again = 2 * 11008 / (4 * 4096 + 3 * 11008)
    assert share_of_tiles(llama) == pytest.approx(again)
    full = {"model__activation_checkpointing": "full"}
    plain, tiled = (speed(**full, model__mlp_tiles=tiles).parts["products"] for tiles in (1, 2))
    assert tiled / plain == pytest.approx((4 + again) / 4, rel=0.01)  # forward, its repetition, and two in backward
    experts = dataclasses.replace(
        llama,
        config=SimpleNamespace(
            **vars(llama.config), per_layer_config=[llama.config], num_experts_per_tok=2, moe_intermediate_size=500
        ),
        layers=(Unit(((4096, 4096),) * 4 + ((8, 1000, 4096), (8, 4096, 500), (8, 4096)), ()),),
    )
    of_experts = 2 * 1500 / (4 * 4096 + 2 * 1500 + 8)
    assert share_of_tiles(experts) == pytest.approx(of_experts)
    # 16 ranks cut each of 8 experts only if they divide its rows; else they gather 16 experts, 8 of them empty.
    run = _Run(experts, settings(), cluster_of(16, 2, "H100"), MIDDLE)
    assert run.parameters - experts.num_parameters == 8 * (1000 * 4096 + 4096)
    runs = []
    for mode in ("none", "selective", "full"):  # `selective` computes the products of experts again
        work, machine = [step("7B", [4096] * 16)], cluster_of(8, 1, "H100")
        planned = expected_speed(experts, settings(model__activation_checkpointing=mode), machine, work, 1)
        runs.append(planned.parts["products"])
    assert (runs[1] - runs[0]) / (runs[2] - runs[0]) == pytest.approx(of_experts)
    # Every second layer is half of all. Of a dense model `selective` computes no product again.
    modes = ("none", "selective", "full")
    plans = [speed(model__activation_checkpointing=mode) for mode in modes]
    assert 1.15 < plans[0].middle / plans[2].middle < 1.35 and plans[2].middle < plans[1].middle < plans[0].middle
    none, selective, every = (plan.parts["products"] for plan in plans)
    half = speed(**full, model__checkpoint_every=2).parts["products"]
    assert selective == none and half == pytest.approx((none + every) / 2)
    assert layer_elements(experts.config, False) == 4096 * 62 + 5 * 2 * 500
    alone, shared = (speed(sharding__context=ranks).parts["communication"] for ranks in (1, 8))
    assert shared > alone


@pytest.mark.parametrize(
    ("measured", "peak", "documents", "tokens", "processes", "changes"),
    [  # tokens per second of the machine, SmolLM2-135M on two cores: AVX512-BF16, AVX2 (fp32) and AMX
        (719, 0.95e12, 8, 250, 1, {}),
        (660, 0.95e12, 16, 250, 2, {}),
        (301, 0.44e12, 8, 250, 1, {}),
        (110, 0.17e12, 8, 250, 1, {"model__compute_dtype": "fp32"}),
        (591, 2.87e12, 8, 250, 1, {}),
    ],
)
def test_cpu_range_includes_measured_speeds(
    measured: int, peak: float, documents: int, tokens: int, processes: int, changes: dict
):
    cluster = cpu_cluster(processes, peak, 24 * 2**30, cores=2)
    result = speed("135M", cluster, step("135M", [tokens] * documents, 1, 0.4 * documents * tokens), **changes)
    low, high = (processes * bound for bound in result.tokens_per_second)
    assert low < measured < high < 3 * low
    assert result.parts["host"] == result.parts["offload"] == 0
    for bound, hours in zip(result.tokens_per_second, reversed(result.hours), strict=True):  # of 100 steps
        assert hours == pytest.approx(100 * documents * tokens / processes / bound / 3600)


def test_two_cpu_ranks_pay_for_their_collectives():
    work = step("135M", [250] * 16, 1, 1600)
    single, two = (speed("135M", cpu_cluster(n, 0.95e12, 24 * 2**30, cores=2), work) for n in (1, 2))
    assert single.parts["communication"] == 0
    assert 0.8 < 2 * two.middle / single.middle < 0.95  # 0.89 measured
