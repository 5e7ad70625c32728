"""Which settings are tried, which of them fit, which is the cheapest; the steps of a run; a plan beside a run.

In the tests of the search memory and speed are stand-ins with round figures.
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
from scripts.plan import command as plan_command
from scripts.plan import planner as plan
from scripts.plan.command import _table, beside
from scripts.plan.machines import Cluster, Device, cpu_cluster
from scripts.plan.planner import (
    Plan,
    Subject,
    candidates,
    measured,
    named_config,
    planned_workload,
    search,
    uniform_workload,
)
from scripts.plan.step_time import Speed
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
KEPT = {"none": 64, "selective": 32, "full": 8, "offload": 4}  # bytes of a row


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
    )
    return shape_of(build_on_meta(config), config)


@pytest.fixture
def find(shape, monkeypatch):
    """Search with stand-ins: memory is state, by strategy and bytes per parameter, and activations; speed goes by checkpointing.

    scale: bytes of state. shared: ranks that share a micro-batch keep less of it. speeds: of a kind of checkpointing. gains:
    of its micro-batches with more than one row.
    """

    def run(config: Config = CONFIG, cluster: Cluster = CLUSTER, scale=8.0, shared=False, speeds=None, gains=None):
        of = {"none": 100.0, "selective": 95.0, "full": 80.0, "offload": 60.0} | (speeds or {})

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
            tokens = of[mode] * (0.1 if config.sharding.cpu_offload else 1)
            tokens *= (gains or {}).get(mode, 1) if config.batch.rows > 1 else 1
            tokens += {"full": 2, "hybrid": 1}.get(config.sharding.strategy, 0)
            return Speed((tokens, tokens), (1.0, 1.0), {}, tokens)

        def workload_of(rows: int, context: int):
            return uniform_workload(shape, 64, 128, 64, 1, rows, cluster.devices // context)

        for stand_in in (step_memory, largest_rows, expected_speed):
            monkeypatch.setattr(plan, stand_in.__name__, stand_in)
        monkeypatch.setattr(memory, "largest_rows", largest_rows)  # for `auto`
        monkeypatch.setattr(plan, "host_bytes", lambda plan: {"offload": 1000 * plan.config.sharding.cpu_offload})
        return search(Subject(config, shape, cluster, workload_of, []))

    return run


def changed(config: Config = CONFIG, **sections) -> Config:
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def said(found: Plan | None) -> str | None:
    """The overrides of a proposal; None if there is none."""
    return found and " ".join(found.overrides).replace("model.activation_checkpointing", "mode")


@pytest.mark.parametrize("cluster,strategies", [(CLUSTER, 3), (TWO_NODES, 4), (Cluster(DEVICE, 1), 1)])
def test_candidates_are_distinct_valid_and_start_with_the_users(shape, cluster, strategies) -> None:
    found = candidates(CONFIG, cluster)
    assert found[0] == CONFIG and len(found) == strategies * 2 * 5 * 6
    subject = Subject(CONFIG, shape, cluster, lambda rows, context: uniform_workload(shape, 64, 9, 64, 1, rows, 16), [])
    written = {tuple(Plan(subject, config).overrides): config for config in found}
    assert len(written) == len(found)
    for overrides, config in written.items():
        check_config(config)
        check_world(config, cluster.devices, cluster.per_node)
        assert override(CONFIG, overrides) == config  # what is printed gives the setting


def test_candidates_keep_what_the_user_chose_where_it_is_valid() -> None:
    found = candidates(changed(sharding={"strategy": "hybrid", "shard_size": 4}, model={"compile": True}), CLUSTER)
    assert {(c.sharding.strategy == "hybrid", c.sharding.shard_size) for c in found} == {(True, 4), (False, None)}
    assert all(config.model.compile for config in found)
    for config in candidates(changed(sharding={"reduce_dtype": "bf16"}), CLUSTER):
        assert config.sharding.reduce_dtype == ("fp32" if config.sharding.strategy == "none" else "bf16")
    found = candidates(changed(model={"mlp_tiles": 2}), CLUSTER)  # with which `selective` is refused
    assert {c.model.activation_checkpointing for c in found} == {"none", "full", "offload"}
    found = candidates(CONFIG, Cluster(CPU, 2))  # where nothing is offloaded
    assert not any(config.sharding.cpu_offload for config in found)
    assert "offload" not in {config.model.activation_checkpointing for config in found}


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
        # They are proposed where they are 1.25 times as fast: 30 + 64 at 6N.
        ({"sharding": GRAD_OP}, {"scale": 80, "speeds": {"none": 110.0}}, "sharding.strategy=full", None,
         "mode=none optimizer.memory=6N sharding.strategy=full"),
        # The most bytes that are fast enough: 48 at 16N, 36 + 64 at 12N, 24 at 8N.
        ({}, {"scale": 48, "speeds": {"none": 200.0, "selective": 80.0}}, "", None, "mode=none optimizer.memory=12N"),
        # Fewer bytes if nothing else fits, and then as many as possible: 112 at 16N, 98 at 14N, 84 at 12N.
        ({}, {"scale": 112, "cluster": dataclasses.replace(CLUSTER, host_memory=999)}, "optimizer.memory=12N", None, None),
        ({}, {"scale": 112}, f"mode=none {OFFLOAD}", None, "optimizer.memory=12N"),
        # What is slow with the user's micro-batch may be the cheapest with a larger one.
        ({}, {"scale": 112, "gains": {"full": 3.0}}, f"batch.micro_batch=2 {OFFLOAD}", None,
         "batch.micro_batch=2 optimizer.memory=12N"),
        # Ranks share a micro-batch before it is offloaded or precision is given up: 80 + 4 / 2. One rank has none to share with.
        ({}, {"scale": 80, "shared": True, "cluster": TIGHT}, "mode=offload sharding.context=2", None, "optimizer.memory=14N"),
        ({}, {"scale": 80, "shared": True, "cluster": ALONE}, OFFLOAD, None, None),
        # A user of 12N gets 12N or more: `selective` needs 60 + 32, and 70 + 32 at 14N.
        ({"optimizer": {"memory": "12N"}, "sharding": {"strategy": "none"}}, {"scale": 80},
         "mode=selective sharding.strategy=full", None, None),
        # A micro-batch that does not fit is made smaller.
        ({"batch": {"micro_batch": 8}, "model": NONE}, {}, "batch.micro_batch=1", None, None),
        # Without packing to one that a run accepts: 8 examples of a step for each of 6 ranks; 3 rows of `selective` fit.
        (UNPACKED, {"scale": 3, "gains": {"selective": 2.0}, "cluster": Cluster(DEVICE, 6)},
         "mode=selective batch.micro_batch=2", None, None),
        # `auto` is what a run takes, 0.85 of the memory (24 + 7 x 8), where that is useful.
        ({"batch": {"micro_batch": "auto"}}, {"scale": 24}, "batch.micro_batch=7", "mode=none batch.micro_batch=1", None),
        ({"batch": {"micro_batch": "auto"}}, {}, "batch.micro_batch=8", "mode=none batch.micro_batch=1", None),
        ({"batch": {"micro_batch": "auto"}, "model": NONE}, {}, "batch.micro_batch=1", None, None),
    ],
)  # fmt: skip
def test_what_is_proposed(find, sections, options, cheapest, faster, lighter) -> None:
    found = find(changed(**sections), **options)
    assert tuple(map(said, (found.cheapest, found.faster, found.lighter))) == (cheapest, faster, lighter)
    assert (found.cheapest is found.own) == found.own.fits == (found.own.rate > 0)
    cluster = found.own.cluster
    for setting in (*found.plans[1:], *filter(None, (found.cheapest, found.faster, found.lighter))):
        check_world(setting.config, cluster.devices, cluster.per_node)


def test_the_table_says_what_n_is_where_ranks_share_a_micro_batch(find) -> None:
    found = [find(scale=80, shared=True, cluster=TIGHT), find()]
    tables = [" ".join(" ".join(_table(one, show_all=True)).split()) for one in found]
    assert [("N= is sharding.context" in table, " N=2 " in table) for table in tables] == [(True, True), (False, False)]


def test_the_nearest_says_how_many_devices_or_how_much_host_memory(find) -> None:
    cluster = dataclasses.replace(CLUSTER, host_memory=10)
    found = find(scale=800, cluster=cluster)  # under full at 16N: 8 devices need 804, 64 devices 104, 96 devices fewer
    assert (found.cheapest, found.faster, found.lighter) == (None, None, None) and found.nearest
    assert (found.nearest.memory.total, said(found.nearest), found.devices) == (804, "mode=offload", 96)
    assert found.with_more_host and found.with_more_host.host == {"offload": 1000}
    assert found.with_more_host.config.sharding.cpu_offload and found.with_more_host.fits_device
    assert find(scale=8000000, cluster=cluster).devices is None
    # More processes of one machine share its memory: 640 / 24 + 8 on 12 machines of two.
    lines = plan_command._nothing_fits(find(scale=80, cluster=Cluster(CPU, 2)))
    assert "It would fit on 12 machines of this kind." in lines


# ---- The steps of a run --------------------------------------------------------------------------------------------------

LENGTH = 128
RANDOM = np.random.default_rng(0)


def inputs_of(
    source, shape, ranks=1, rows=1, packing=True, pair_weight=1, examples=8, epochs=2, max_steps=None
) -> Inputs:
    """Like training.inputs.read_inputs, of a source in memory."""
    corpus = as_corpus(source)
    plan = plan_training(corpus, epochs=epochs, seed=0, global_examples=examples)
    costs = functools.partial(shape.work.costs, pair_weight=pair_weight)
    dealer = Dealer(rows * LENGTH if packing else rows, costs, packing)

    def deal(items):
        return dealer.deal(items, corpus, ranks)

    return Inputs(corpus, plan, max_steps or plan.num_steps, 0, None, None, dealer, deal, None, CONFIG)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("packing", [True, False])
def test_steps_and_worst_micro_batch_are_those_of_a_run(shape, ranks, packing) -> None:
    source = chats(RANDOM.integers(10, LENGTH, 30))
    run = inputs_of(source, shape, ranks, rows=2, packing=packing)
    # The inputs that a planner has were read for another micro-batch and one rank.
    found = planned_workload(inputs_of(source, shape, packing=packing), shape, 2, LENGTH, ranks)
    assert found.total_steps == len(found.steps) == run.total_steps == 8 and found.is_exact
    most = 0
    for step, work in enumerate(found.steps):
        batch, deal = run.plan.batch(step), run.deal(step)
        assert (work.step, work.tokens, work.targets) == (step, sum(batch.document_lengths), batch.num_target_tokens)
        assert work.micro_batches == len(deal.items) and work.balance == balance([deal])
        assert work.flops == step_flops(shape.work, batch.document_lengths, batch.num_target_tokens)
        for micro_batch in deal.items:
            most = max([most, *(sum(collate(items, run.train).document_lengths) for items in micro_batch if items)])
    worst = found.worst
    assert worst.tokens == most
    candidates = [micro_batch[worst.rank] for micro_batch in run.deal(worst.step).items]
    tensors = [collate(items, run.train) for items in candidates]
    assert any(one.document_lengths == worst.lengths and len(one.target_ids) == worst.targets for one in tensors)


def test_the_deals_are_those_of_the_planned_device(shape, monkeypatch) -> None:
    monkeypatch.setattr(plan, "PAIR_WEIGHTS", {"cpu": 10**6, "cuda": 1})
    inputs = inputs_of(texts(RANDOM.integers(10, LENGTH, 40)), shape, examples=20)
    on = {kind: planned_workload(inputs, shape, 1, LENGTH, 4, kind).steps[0].balance for kind in ("cpu", "cuda")}
    for kind, weight in plan.PAIR_WEIGHTS.items():
        deal = inputs_of(inputs.train, shape, 4, pair_weight=weight, examples=20).deal(0)
        assert on[kind] == balance([deal])
    assert on["cpu"] != on["cuda"]


def test_only_the_steps_of_the_run_are_looked_at_and_not_more_than_the_limit(shape, monkeypatch) -> None:
    lengths = [20] * 47 + [100]
    inputs = inputs_of(texts(lengths), shape, examples=1, epochs=1, max_steps=40)
    longest = max(inputs.plan.batch(step).document_lengths[0] for step in range(40))
    found = planned_workload(inputs, shape, 1, LENGTH, 1)
    assert found.total_steps == len(found.steps) == 40 and found.worst.tokens == longest and found.is_exact
    monkeypatch.setattr(plan, "MOST_DEALS", 5)
    monkeypatch.setattr(plan, "MOST_STEPS", 3)
    bounded = planned_workload(inputs, shape, 1, LENGTH, 1)
    assert bounded.total_steps == 40 and not bounded.is_exact
    assert [step.step for step in bounded.steps] == [0, 20, 39]


@pytest.mark.parametrize(
    "examples,global_examples,rows,ranks", [(20, 8, 1, 4), (21, 8, 3, 2), (7, 64, 2, 4), (5, 5, 8, 1)]
)
def test_a_uniform_workload_is_that_of_equal_documents(shape, examples, global_examples, rows, ranks) -> None:
    length = 32
    found = uniform_workload(shape, examples, length, global_examples, 3, rows, ranks)
    inputs = inputs_of(texts([length] * examples), shape, examples=global_examples, epochs=3)
    real = planned_workload(inputs, shape, rows, length, ranks)
    assert found.total_steps == real.total_steps and found.worst.lengths == real.worst.lengths
    for ours, theirs in zip(found.steps, real.steps, strict=True):
        assert (ours.step, ours.tokens, ours.micro_batches) == (theirs.step, theirs.tokens, theirs.micro_batches)
        assert ours.balance == pytest.approx(theirs.balance, abs=0.02)  # costs of a text have one target less
        assert ours.flops == pytest.approx(theirs.flops, rel=0.02)


# ---- Host, disk, and a plan beside a run ---------------------------------------------------------------------------------


@functools.cache
def shape_135m() -> ModelShape:
    return shape_of(build_on_meta(named_config("135M")), named_config("135M"))


def large(cluster: Cluster, **sections: dict) -> Plan:
    config, workload = changed(**sections), uniform_workload(shape_135m(), 64, 64, 64, 1, 1, 1)
    return Plan(Subject(config, shape_135m(), cluster, lambda rows, context: workload, []), config)


def test_what_is_kept_on_the_host_and_on_disk() -> None:
    two = dataclasses.replace(CLUSTER, devices=2)
    found = large(
        two,
        model={"activation_checkpointing": "offload"},
        run={"async_save": True, "eval_general": True, "keep_last": 3},
        ewc={"strength": 1.0, "data": ("b",), "device": "cpu"},
    )
    count, host = found.shape.num_parameters, found.host
    assert host["activations"] == 2 * 30 * 64 * 576 * 2  # ranks, layers, tokens, hidden size in bf16
    assert host["async_save"] == pytest.approx(12 * count, rel=0.01)  # fp32 weights and moments
    assert host["ewc"] == pytest.approx(8 * count, rel=0.01)
    tokens = 2048 + (1024 if found.config.data.validation else 0)  # of the text, and of the task's prompts
    assert host["forgetting"] == tokens * (2 * 49152 + 8)
    held_out = large(two, run={"eval_general": True}, data={"validation": (), "validation_share": 0.1})
    assert held_out.host["forgetting"] == 3072 * (2 * 49152 + 8)
    offload = large(two, sharding={"cpu_offload": True})
    exact = 2 * 8 * count  # of two ranks in fp32: half of the weights, gradients and moments each
    assert exact <= offload.host["offload"] < 1.6 * exact  # pinned tensors are rounded up to a power of two
    assert not sum(large(dataclasses.replace(two, device=CPU), sharding={"cpu_offload": True}).host.values())
    many = large(two)
    many = Plan(dataclasses.replace(many.subject, documents=10**8), many.config)
    assert many.host["data"] == 2 * 64 * 10**8 and not sum(large(two).host.values())
    slow = {rate: " ".join(plan_command._host_and_disk(many, rate)) for rate in (1e9, 1e5)}
    assert " 11.9  lists of documents while all ranks start" in slow[1e9] and "warning" not in slow[1e9]
    assert "A save: 2 s at 1 GB/s (--save-bandwidth); the export: 1 s, written and read again" in slow[1e9]
    assert "warning: raise run.timeout_minutes=30, which" in slow[1e5]
    size = large(two, optimizer={"memory": "8N"}, run={"keep_last": 3}).disk
    assert size["checkpoint"] == pytest.approx(6 * count, rel=1e-4)
    assert size["export"] == 2 * count and size["run"] == 6 * size["checkpoint"]
    anchored = Plan(dataclasses.replace(many.subject, anchor=10**9), many.config)
    assert anchored.disk["run"] == many.disk["run"] + 10**9


def test_on_a_cpu_memory_is_a_range_whose_end_must_fit() -> None:
    small = large(Cluster(CPU, 1))
    least, most = small.needed
    assert least == small.memory.total and most == round(plan.CPU_EXCESS * least)
    for size, fits in ((most, True), (most - 1, False)):
        assert large(Cluster(dataclasses.replace(CPU, memory=size), 1)).fits == fits
    on_gpu = large(Cluster(DEVICE, 1))
    assert on_gpu.needed == (on_gpu.memory.total,) * 2


def test_processes_of_a_run_share_the_cores_and_the_memory_of_the_machine(tmp_path, monkeypatch) -> None:
    settings = {"batch": {"micro_batch": 3}}
    start = {"world_size": 2, "devices": [{"host": "a", "device": "cpu"}], "config": settings}
    (tmp_path / "config.json").write_text(json.dumps(start))
    monkeypatch.setattr(plan, "measured_flops", lambda *arguments: 1e11)
    planned = list[tuple[Cluster, int]]()
    monkeypatch.setattr(plan, "plan_of", lambda config, cluster, rows: planned.append((cluster, rows)))
    config = Config(Model("m"), Data(("d",)), Batch(1, micro_batch="auto"), Optimizer(1e-4), Run("r"))
    plan.plan_of_run(config, tmp_path)
    ((found, rows),) = planned
    assert found == cpu_cluster(2, 1e11, found.host_memory) and found.device.memory == found.host_memory // 2
    assert rows == 3  # what the run took for `auto`


def test_a_plan_beside_a_run(tmp_path, monkeypatch) -> None:
    rows = [
        {"step": step, "train/tokens": 100 * step, "train/tokens_per_second": speed, "train/memory_gib": 4.0}
        for step, speed in ((2, 1.0), (4, 100.0), (6, 50.0))  # the first row holds what happens once
    ]
    lines = [json.dumps(row) for row in [rows[0], {"step": 2, "validation/loss": 1.0}, *rows[1:]]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = measured(tmp_path)
    assert found == {"steps": 4, "tokens_per_second": 400 / (200 / 100 + 200 / 50), "memory_gib": 4.0}
    peak = StepMemory(2**31, 0, 0, 0, 0, 0, 2**30, 0, 2**30, 2**30)
    monkeypatch.setattr(plan, "step_memory", lambda *arguments: peak)
    monkeypatch.setattr(plan, "expected_speed", lambda *arguments: Speed((30.0, 40.0), (1.0, 2.0), {}, 35.0))
    said = beside(large(dataclasses.replace(CLUSTER, devices=2)), found)
    assert said == (
        "planned against measured (4 steps): peak memory 3.0 and 4.0 GiB (-25%); 60 to 80 and 67 tokens/s, in the range"
    )
    assert "5.0 to 11.0 and 4.0 GiB; 30 to 40 and 67 tokens/s, outside of the range" in beside(
        large(Cluster(CPU, 1)), found
    )
