"""The search for settings, the steps of a run, host memory and disk, and a plan beside a run.

The tests of the search replace memory and speed by round figures.
"""

import dataclasses
import functools
import json

import numpy as np
import pytest
from transformers import LlamaConfig

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from configs.load import check_config, check_world, override
from data.batches import collate, plan_training
from data.dealing import Dealer, balance
from data.sources import as_corpus
from model import memory
from model.flops import step_flops
from model.language_model import build_on_meta
from model.memory import ModelShape, StepMemory, shape_of
from scripts.plan import against, machines, planner, report, workload
from scripts.plan.against import beside, measured
from scripts.plan.machines import Cluster, Device, cpu_cluster
from scripts.plan.models import named_config
from scripts.plan.planner import Plan
from scripts.plan.search import candidates, search
from scripts.plan.step_time import Speed
from scripts.plan.subject import Subject
from scripts.plan.workload import planned_workload, uniform_workload
from tests.in_memory import chats, texts
from training.inputs import Inputs

DEVICE = Device("card", "cuda", memory=100, flops=1e12, bandwidth=1e12, link=1e9)
CLUSTER = Cluster(DEVICE, 8)
CPU = dataclasses.replace(DEVICE, kind="cpu")
TWO_NODES = Cluster(DEVICE, 16, nodes=2, network=1e9)
CONFIG = Config(
    Model("model", activation_checkpointing="full"),
    Data(("a.jsonl",), sequence_length=128),
    Batch(global_examples=64),
    Optimizer(1e-5),
    Run("r"),
)
STATE = {"full": 1, "grad_op": 1.5, "hybrid": 2, "none": 8}  # bytes at 16N on 8 devices, times the scale of `find`
KEPT = {"none": 64, "selective": 32, "full": 8, "offload": 4}  # bytes of activations per row


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
    )
    return shape_of(build_on_meta(config), config)


@pytest.fixture
def find(shape, monkeypatch):
    """Search with round figures: state depends on strategy and bytes per parameter, activations and speed on checkpointing.

    `scale` multiplies the state. With `shared`, ranks that share a micro-batch keep less of it. `speeds` replace the speeds of
    kinds of checkpointing; `gains` multiply them for micro-batches with more than one row.
    """

    def run(config: Config = CONFIG, cluster: Cluster = CLUSTER, scale=8.0, shared=False, speeds=None, gains=None):
        speed_of = {"none": 100.0, "selective": 95.0, "full": 80.0, "offload": 60.0} | (speeds or {})

        def step_memory(shape, config, layout, lengths, targets) -> StepMemory:
            rows = max(1, sum(lengths) // 128) / (layout.context if shared else 1)
            state = scale * STATE[config.sharding.strategy] * int(config.optimizer.memory[:-1]) / 16 * 8 / layout.ranks
            kept = KEPT[config.model.activation_checkpointing] * config.model.checkpoint_every
            return StepMemory(int(0 if config.sharding.cpu_offload else state) + rows * kept, *[0] * 9)

        def largest_rows(shape, config, layout, fits, at_most) -> int:
            rows = range(1, at_most + 1)
            return max((n for n in rows if fits(step_memory(shape, config, layout, (128 * n,), 0))), default=0)

        def expected_speed(shape, config, cluster, steps, total_steps) -> Speed:
            mode = config.model.activation_checkpointing
            tokens = speed_of[mode] * (0.1 if config.sharding.cpu_offload else 1)
            tokens *= (gains or {}).get(mode, 1) if config.batch.rows > 1 else 1
            tokens += {"full": 2, "hybrid": 1}.get(config.sharding.strategy, 0)
            return Speed((tokens, tokens), (1.0, 1.0), {}, tokens)

        def workload_of(rows: int, context: int):
            return uniform_workload(shape, 64, 128, 64, 1, rows, cluster.devices // context)

        for stand_in in (step_memory, largest_rows, expected_speed):
            monkeypatch.setattr(planner, stand_in.__name__, stand_in)
        monkeypatch.setattr(memory, "largest_rows", largest_rows)  # for `auto`
        monkeypatch.setattr(planner, "host_bytes", lambda plan: {"offload": 1000 * plan.config.sharding.cpu_offload})
        return search(Subject(config, shape, cluster, workload_of, []))

    return run


def changed(config: Config = CONFIG, **sections) -> Config:
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def overrides_of(proposal: Plan | None) -> str | None:
    return proposal and " ".join(proposal.overrides).replace("model.activation_checkpointing", "mode")


def all_candidates(config: Config, cluster: Cluster) -> list[Config]:
    return [each for offload in (False, True) for each in candidates(config, cluster, offload)]


@pytest.mark.parametrize("cluster,strategies", [(CLUSTER, 3), (TWO_NODES, 4), (Cluster(DEVICE, 1), 1)])
def test_candidates_are_distinct_and_valid(shape, cluster, strategies) -> None:
    configs = all_candidates(CONFIG, cluster)
    assert configs[0] == CONFIG and len(configs) == strategies * 2 * 5 * 6
    subject = Subject(CONFIG, shape, cluster, lambda rows, context: uniform_workload(shape, 64, 9, 64, 1, rows, 16), [])
    written = {tuple(Plan(subject, config).overrides): config for config in configs}
    assert len(written) == len(configs)
    for overrides, config in written.items():
        check_config(config)
        check_world(config, cluster.devices, cluster.per_node)
        assert override(CONFIG, overrides) == config  # the printed overrides give the setting


def test_candidates_keep_valid_choices_of_the_user() -> None:
    configs = all_candidates(
        changed(sharding={"strategy": "hybrid", "shard_size": 4}, model={"compile": True}), CLUSTER
    )
    assert {(c.sharding.strategy == "hybrid", c.sharding.shard_size) for c in configs} == {(True, 4), (False, None)}
    assert all(config.model.compile for config in configs)
    for config in all_candidates(changed(sharding={"reduce_dtype": "bf16"}), CLUSTER):
        assert config.sharding.reduce_dtype == ("fp32" if config.sharding.strategy == "none" else "bf16")
    configs = all_candidates(changed(model={"mlp_tiles": 2}), CLUSTER)  # with which `selective` is refused
    assert {c.model.activation_checkpointing for c in configs} == {"none", "full", "offload"}
    configs = all_candidates(CONFIG, Cluster(CPU, 2))  # where nothing is offloaded
    assert not any(config.sharding.cpu_offload for config in configs)
    assert "offload" not in {config.model.activation_checkpointing for config in configs}


GAINS = dict.fromkeys(KEPT, 1.5)
OFFLOAD = "sharding.cpu_offload=True"
TIGHT = dataclasses.replace(CLUSTER, device=dataclasses.replace(DEVICE, memory=83))
ALONE = Cluster(dataclasses.replace(DEVICE, memory=9), 1)
NONE, GRAD_OP = {"activation_checkpointing": "none"}, {"strategy": "grad_op"}
UNPACKED = {"data": {"packing": False}, "batch": {"global_examples": 48, "micro_batch": 8}, "model": NONE}


@pytest.mark.parametrize(
    ("sections", "options", "cheapest", "faster", "lighter"),
    [
        # It fits with 8 + 8 bytes; fewer bytes per parameter bring no speed.
        ({}, {}, "", "mode=none", None),
        # Of several rows `selective` holds two, `none` one.
        ({}, {"gains": GAINS}, "", "mode=selective batch.micro_batch=2", None),
        # The fastest with the same precision comes before fewer bytes: grad_op holds 120, full 80 + 8.
        ({"sharding": GRAD_OP}, {"scale": 80}, "sharding.strategy=full", None, None),
        # Fewer bytes are proposed if they are 1.25 times as fast: 30 + 64 at 6N.
        ({"sharding": GRAD_OP}, {"scale": 80, "speeds": {"none": 110.0}}, "sharding.strategy=full", None,
         "mode=none optimizer.memory=6N sharding.strategy=full"),
        # The most bytes that are fast enough: 48 at 16N, 36 + 64 at 12N, 24 at 8N.
        ({}, {"scale": 48, "speeds": {"none": 200.0, "selective": 80.0}}, "", None, "mode=none optimizer.memory=12N"),
        # Offload before fewer bytes: 112 at 16N, 98 at 14N, 84 at 12N. A CPU cannot offload; there as many bytes as possible.
        ({}, {"scale": 50, "cluster": Cluster(CPU, 8)}, "optimizer.memory=12N", None, None),
        ({}, {"scale": 112}, f"mode=none {OFFLOAD}", None, "optimizer.memory=12N"),
        # A setting that is slow with the user's micro-batch may be the cheapest with a larger one.
        ({}, {"scale": 112, "gains": {"full": 3.0}}, f"batch.micro_batch=2 {OFFLOAD}", None,
         "batch.micro_batch=2 optimizer.memory=12N"),
        # Ranks share a micro-batch before offload or fewer bytes: 80 + 4 / 2. A single rank cannot share.
        ({}, {"scale": 80, "shared": True, "cluster": TIGHT}, "mode=offload sharding.context=2", None, "optimizer.memory=14N"),
        ({}, {"scale": 80, "shared": True, "cluster": ALONE}, OFFLOAD, None, None),
        # A user of 12N gets 12N or more: `selective` needs 60 + 32, and 70 + 32 at 14N.
        ({"optimizer": {"memory": "12N"}, "sharding": {"strategy": "none"}}, {"scale": 80},
         "mode=selective sharding.strategy=full", None, None),
        # A micro-batch that does not fit is made smaller.
        ({"batch": {"micro_batch": 8}, "model": NONE}, {}, "batch.micro_batch=1", None, None),
        # Without packing, a run must accept it: a step has 8 examples for each of 6 ranks; 3 rows of `selective` fit.
        (UNPACKED, {"scale": 3, "gains": {"selective": 2.0}, "cluster": Cluster(DEVICE, 6)},
         "mode=selective batch.micro_batch=2", None, None),
        # `auto` becomes the rows that a run takes, 0.85 of the memory (24 + 7 x 8), but no more than are useful.
        ({"batch": {"micro_batch": "auto"}}, {"scale": 24}, "batch.micro_batch=7", "mode=none batch.micro_batch=1", None),
        ({"batch": {"micro_batch": "auto"}}, {}, "batch.micro_batch=8", "mode=none batch.micro_batch=1", None),
        ({"batch": {"micro_batch": "auto"}, "model": NONE}, {}, "batch.micro_batch=1", None, None),
    ],
)  # fmt: skip
def test_what_is_proposed(find, sections, options, cheapest, faster, lighter) -> None:
    result = find(changed(**sections), **options)
    proposals = result.cheapest, result.faster, result.lighter
    assert tuple(map(overrides_of, proposals)) == (cheapest, faster, lighter)
    assert (result.cheapest is result.own) == result.own.fits == (result.own.rate > 0)
    cluster = result.own.cluster
    for setting in (*result.plans[1:], *filter(None, proposals)):
        check_world(setting.config, cluster.devices, cluster.per_node)


def test_table_explains_n_if_ranks_share_micro_batches(find) -> None:
    results = [find(scale=80, shared=True, cluster=TIGHT), find()]
    tables = [" ".join(" ".join(report._table(result, show_all=True)).split()) for result in results]
    assert [("N= is sharding.context" in table, " N=2 " in table) for table in tables] == [(True, True), (False, False)]


def test_nearest_setting_has_a_number_of_devices(find) -> None:
    # More processes of one machine share its memory: 640 / 24 + 8 on 12 machines of two.
    result = find(scale=80, cluster=Cluster(CPU, 2))
    assert (result.cheapest, result.faster, result.lighter) == (None, None, None) and result.nearest
    assert (result.nearest.memory.total, overrides_of(result.nearest), result.devices) == (328, "", 24)
    assert "It would fit on 12 machines of this kind." in report._nothing_fits(result)
    result = find(scale=8000000, cluster=Cluster(CPU, 2))
    assert result.devices is None
    assert "Not even 64 times as many machines of this kind would be enough." in report._nothing_fits(result)


# ---- The steps of a run --------------------------------------------------------------------------------------------------

LENGTH = 128
RANDOM = np.random.default_rng(0)


def inputs_of(
    source, shape, ranks=1, rows=1, packing=True, pair_weight=1, examples=8, epochs=2, max_steps=None
) -> Inputs:
    """Return the inputs of training.inputs.read_inputs for a source in memory."""
    corpus = as_corpus(source)
    plan = plan_training(corpus, epochs=epochs, seed=0, global_examples=examples)
    costs = functools.partial(shape.work.costs, pair_weight=pair_weight)
    dealer = Dealer(rows * LENGTH if packing else rows, costs, packing)

    def deal(items):
        return dealer.deal(items, corpus, ranks)

    return Inputs(corpus, plan, max_steps or plan.num_steps, 0, None, None, dealer, deal, None, CONFIG)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("packing", [True, False])
def test_workload_agrees_with_the_run(shape, ranks, packing) -> None:
    source = chats(RANDOM.integers(10, LENGTH, 30))
    run = inputs_of(source, shape, ranks, rows=2, packing=packing)
    # A planner's inputs were read for another micro-batch and one rank.
    planned = planned_workload(inputs_of(source, shape, packing=packing), shape, 2, LENGTH, ranks)
    assert planned.total_steps == len(planned.steps) == run.total_steps == 8 and planned.is_exact
    most = 0
    for step, work in enumerate(planned.steps):
        batch, deal = run.plan.batch(step), run.deal(step)
        assert (work.step, work.tokens, work.targets) == (step, sum(batch.document_lengths), batch.num_target_tokens)
        assert work.micro_batches == len(deal.items) and work.balance == balance([deal])
        assert work.flops == step_flops(shape.work, batch.document_lengths, batch.num_target_tokens)
        for micro_batch in deal.items:
            most = max([most, *(sum(collate(items, run.train).document_lengths) for items in micro_batch if items)])
    worst = planned.worst
    assert worst.tokens == most
    on_rank = [micro_batch[worst.rank] for micro_batch in run.deal(worst.step).items]
    tensors = [collate(items, run.train) for items in on_rank]
    assert any(batch.document_lengths == worst.lengths and len(batch.target_ids) == worst.targets for batch in tensors)


def test_deals_depend_on_the_planned_device(shape, monkeypatch) -> None:
    monkeypatch.setattr(workload, "PAIR_WEIGHTS", {"cpu": 10**6, "cuda": 1})
    inputs = inputs_of(texts(RANDOM.integers(10, LENGTH, 40)), shape, examples=20)
    on = {kind: planned_workload(inputs, shape, 1, LENGTH, 4, kind).steps[0].balance for kind in ("cpu", "cuda")}
    for kind, weight in workload.PAIR_WEIGHTS.items():
        deal = inputs_of(inputs.train, shape, 4, pair_weight=weight, examples=20).deal(0)
        assert on[kind] == balance([deal])
    assert on["cpu"] != on["cuda"]


def test_long_runs_are_sampled(shape, monkeypatch) -> None:
    lengths = [20] * 47 + [100]
    inputs = inputs_of(texts(lengths), shape, examples=1, epochs=1, max_steps=40)
    longest = max(inputs.plan.batch(step).document_lengths[0] for step in range(40))
    planned = planned_workload(inputs, shape, 1, LENGTH, 1)
    assert planned.total_steps == len(planned.steps) == 40 and planned.worst.tokens == longest and planned.is_exact
    monkeypatch.setattr(workload, "MOST_DEALS", 5)
    monkeypatch.setattr(workload, "MOST_STEPS", 3)
    bounded = planned_workload(inputs, shape, 1, LENGTH, 1)
    assert bounded.total_steps == 40 and not bounded.is_exact
    assert [step.step for step in bounded.steps] == [0, 20, 39]


@pytest.mark.parametrize(
    "examples,global_examples,rows,ranks", [(20, 8, 1, 4), (21, 8, 3, 2), (7, 64, 2, 4), (5, 5, 8, 1)]
)
def test_uniform_workload_agrees_with_equal_documents(shape, examples, global_examples, rows, ranks) -> None:
    length = 32
    uniform = uniform_workload(shape, examples, length, global_examples, 3, rows, ranks)
    inputs = inputs_of(texts([length] * examples), shape, examples=global_examples, epochs=3)
    real = planned_workload(inputs, shape, rows, length, ranks)
    assert uniform.total_steps == real.total_steps and uniform.worst.lengths == real.worst.lengths
    for ours, theirs in zip(uniform.steps, real.steps, strict=True):
        assert (ours.step, ours.tokens, ours.micro_batches) == (theirs.step, theirs.tokens, theirs.micro_batches)
        assert ours.balance == pytest.approx(theirs.balance, abs=0.02)  # the first token of a text is no target
        assert ours.flops == pytest.approx(theirs.flops, rel=0.02)


# ---- Host, disk, and a plan beside a run ---------------------------------------------------------------------------------


@functools.cache
def shape_135m() -> ModelShape:
    return shape_of(build_on_meta(named_config("135M")), named_config("135M"))


def large(cluster: Cluster, **sections: dict) -> Plan:
    config, planned = changed(**sections), uniform_workload(shape_135m(), 64, 64, 64, 1, 1, 1)
    return Plan(Subject(config, shape_135m(), cluster, lambda rows, context: planned, []), config)


def test_host_memory_and_disk() -> None:
    two = dataclasses.replace(CLUSTER, devices=2)
    plan = large(
        two,
        model={"activation_checkpointing": "offload"},
        run={"async_save": True, "keep_last": 3},
        ewc={"strength": 1.0, "data": ("b",), "device": "cpu"},
    )
    count, host = plan.shape.num_parameters, plan.host
    assert host["activations"] == 2 * 30 * 64 * 576 * 2  # ranks, layers, tokens, hidden size in bf16
    assert host["async_save"] == pytest.approx(12 * count, rel=0.01)  # fp32 weights and moments
    assert host["ewc"] == pytest.approx(8 * count, rel=0.01)
    assert (
        f"Memory of a node's host: {sum(host.values()) / 2**30:.1f} GiB (activations" in report._host_and_disk(plan)[0]
    )
    offload = large(two, sharding={"cpu_offload": True})
    exact = 2 * 8 * count  # of two ranks in fp32: half of the weights, gradients and moments each
    assert exact <= offload.host["offload"] < 1.6 * exact  # pinned tensors are rounded up to a power of two
    assert not sum(large(dataclasses.replace(two, device=CPU), sharding={"cpu_offload": True}).host.values())
    plain = large(two)
    assert not sum(plain.host.values())
    lines = " ".join(report._host_and_disk(plain))
    assert "A save: 2 s at 1 GB/s; the export: 1 s, written and read again" in lines and "warning" not in lines
    lines = " ".join(" ".join(report._host_and_disk(large(two, run={"timeout_minutes": 0.01}))).split())
    assert "warning: raise run.timeout_minutes=0.01, which" in lines
    size = large(two, optimizer={"memory": "8N"}, run={"keep_last": 3}).disk
    assert size["checkpoint"] == pytest.approx(6 * count, rel=1e-4)
    assert size["export"] == 2 * count and size["run"] == 6 * size["checkpoint"]
    anchored = Plan(dataclasses.replace(plain.subject, anchor=10**9), plain.config)
    assert anchored.disk["run"] == plain.disk["run"] + 10**9


def test_cpu_memory_is_a_range_that_must_fit() -> None:
    small = large(Cluster(CPU, 1))
    least, most = small.needed
    assert least == small.memory.total and most == round(planner.CPU_EXCESS * least)
    for size, fits in ((most, True), (most - 1, False)):
        assert large(Cluster(dataclasses.replace(CPU, memory=size), 1)).fits == fits
    on_gpu = large(Cluster(DEVICE, 1))
    assert on_gpu.needed == (on_gpu.memory.total,) * 2


def test_processes_share_the_machine_of_the_run(tmp_path, monkeypatch) -> None:
    settings = {"batch": {"micro_batch": 3}}
    start = {"world_size": 2, "devices": [{"host": "a", "device": "cpu"}], "config": settings}
    (tmp_path / "config.json").write_text(json.dumps(start))
    monkeypatch.setattr(machines, "measured_flops", lambda *arguments: 1e11)
    monkeypatch.setattr(machines, "free_bytes", lambda *arguments: 2**34)
    planned = list[tuple[Cluster, int]]()
    monkeypatch.setattr(against, "plan_of", lambda config, cluster, rows: planned.append((cluster, rows)))
    config = Config(Model("m"), Data(("d",)), Batch(1, micro_batch="auto"), Optimizer(1e-4), Run("r"))
    against.plan_of_run(config, tmp_path)
    assert planned == [(cpu_cluster(2, 1e11, 2**34), 3)]  # 3 rows, which the run took for `auto`


def test_plan_beside_a_run(tmp_path, monkeypatch) -> None:
    rows = [
        {"step": step, "train/tokens": 100 * step, "train/tokens_per_second": speed, "train/memory_gib": 4.0}
        for step, speed in ((2, 1.0), (4, 100.0), (6, 50.0))  # the first row is left out
    ]
    lines = [json.dumps(row) for row in [rows[0], {"step": 2, "validation/loss": 1.0}, *rows[1:]]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    figures = measured(tmp_path)
    assert figures == {"steps": 4, "tokens_per_second": 400 / (200 / 100 + 200 / 50), "memory_gib": 4.0}
    peak = StepMemory(2**31, 0, 0, 0, 0, 0, 2**30, 0, 2**30, 2**30)
    monkeypatch.setattr(planner, "step_memory", lambda *arguments: peak)
    monkeypatch.setattr(planner, "expected_speed", lambda *arguments: Speed((30.0, 40.0), (1.0, 2.0), {}, 35.0))
    line = beside(large(dataclasses.replace(CLUSTER, devices=2)), figures)
    assert line == (
        "planned against measured (4 steps): peak memory 3.0 and 4.0 GiB (-25%); 60 to 80 and 67 tokens/s, in the range"
    )
    assert "5.0 to 11.0 and 4.0 GiB; 30 to 40 and 67 tokens/s, outside of the range" in beside(
        large(Cluster(CPU, 1)), figures
    )
