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
from eval import forgetting
from model.flops import step_flops
from model.language_model import build_on_meta
from model.memory import ModelShape, StepMemory, shape_of
from tests.in_memory import chats, texts
from tools import plan
from tools.machines import Cluster, Device
from tools.plan import (
    Found,
    Plan,
    Subject,
    candidates,
    measured,
    named_config,
    planned_workload,
    search,
    uniform_workload,
)
from tools.plan_command import beside
from tools.step_time import Speed
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
STATE = {"full": 1, "grad_op": 1.5, "hybrid": 2, "none": 8}  # bytes at 16N on 8 devices, times `StandIns.scale`
KEPT = {"none": 64, "selective": 32, "full": 8, "offload": 4}  # bytes of a row


@dataclasses.dataclass
class StandIns:
    """Memory is state, by strategy and bytes per parameter, and activations. Speed goes by checkpointing; offload takes 9/10."""

    scale: float = 8
    shared: bool = False  # whether ranks that share a micro-batch keep less of it
    gain: float = 1.0  # of more than one row
    gain_of: dict[str, float] = dataclasses.field(default_factory=dict)  # the same, of one kind of checkpointing alone
    speeds: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"none": 100.0, "selective": 95.0, "full": 80.0, "offload": 60.0}
    )

    def bytes(self, config: Config, ranks: int, rows: float) -> int:
        state = self.scale * STATE[config.sharding.strategy] * int(config.optimizer.memory[:-1]) / 16
        state *= 8 / ranks
        kept = KEPT[config.model.activation_checkpointing] * config.model.checkpoint_every
        return int(0 if config.sharding.cpu_offload else state) + rows * kept

    def step_memory(self, shape, config, layout, lengths, targets) -> StepMemory:
        rows = max(1, sum(lengths) // 128) / (layout.context if self.shared else 1)
        return StepMemory(self.bytes(config, layout.ranks, rows), *[0] * 9)

    def largest_rows(self, shape, config, layout, fits, at_most) -> int:
        rows = range(1, at_most + 1)
        return max((n for n in rows if fits(self.step_memory(shape, config, layout, (128 * n,), 0))), default=0)

    def expected_speed(self, shape, config, cluster, steps, total_steps) -> Speed:
        tokens = self.speeds[config.model.activation_checkpointing] * (0.1 if config.sharding.cpu_offload else 1)
        if config.batch.rows > 1:
            tokens *= self.gain_of.get(config.model.activation_checkpointing, self.gain)
        tokens += {"full": 2, "hybrid": 1}.get(config.sharding.strategy, 0)
        return Speed((tokens, tokens), (1.0, 1.0), {}, tokens)


@pytest.fixture
def stand_ins(monkeypatch) -> StandIns:
    found = StandIns()
    for name in ("step_memory", "largest_rows", "expected_speed"):
        monkeypatch.setattr(plan, name, getattr(found, name))
    monkeypatch.setattr(Plan, "host", property(lambda self: {"offload": 1000 * self.config.sharding.cpu_offload}))
    return found


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
    )
    return shape_of(build_on_meta(config), config)


def find(shape: ModelShape, config: Config, cluster: Cluster = CLUSTER) -> Found:
    def workload_of(rows: int, context: int):
        return uniform_workload(shape, 64, 128, 64, 1, rows, cluster.devices // context)

    return search(Subject(config, shape, cluster, workload_of, []))


def overrides(config: Config, base: Config) -> list[str]:
    return Plan(Subject(base, None, CLUSTER, None, []), config).overrides


def changed(config: Config, **sections) -> Config:
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


@pytest.mark.parametrize("cluster,strategies", [(CLUSTER, 3), (TWO_NODES, 4), (Cluster(DEVICE, 1), 1)])
def test_candidates_are_distinct_valid_and_start_with_the_users(cluster, strategies) -> None:
    found = candidates(CONFIG, cluster)
    assert found[0] == CONFIG and len(found) == strategies * 2 * 5 * 6
    written = {tuple(overrides(config, CONFIG)) for config in found}
    assert len(written) == len(found)
    for config in found:
        check_config(config)
        check_world(config, cluster.devices, cluster.per_node)
        assert override(CONFIG, overrides(config, CONFIG)) == config  # what is printed gives the setting


def test_without_packing_only_micro_batches_that_a_run_accepts_are_proposed(stand_ins, shape) -> None:
    """8 examples of a step for each rank: 3 rows of `selective` fit, and 2 are proposed."""
    stand_ins.scale, stand_ins.gain = 3.0, 2.0
    cluster = Cluster(DEVICE, 6)
    own = changed(CONFIG, data={"packing": False}, batch={"global_examples": 48, "micro_batch": 8})
    own = changed(own, model={"activation_checkpointing": "none"})
    found = find(shape, own, cluster)
    rows = {
        setting.config.model.activation_checkpointing: (setting.largest_rows, setting.config.batch.micro_batch)
        for setting in found.plans
        if setting.config.sharding == own.sharding and setting.config.optimizer.memory == "16N"
    }
    assert rows["selective"] == (3, 2)
    proposed = [setting for setting in (found.cheapest, found.faster, found.lighter) if setting]
    assert proposed
    for setting in (*found.plans[1:], *proposed):
        check_world(setting.config, 6, 6)


def test_candidates_keep_what_the_user_chose_where_it_is_valid() -> None:
    own = changed(CONFIG, sharding={"strategy": "hybrid", "shard_size": 4}, model={"compile": True})
    found = candidates(own, CLUSTER)
    assert {config.sharding.shard_size for config in found if config.sharding.strategy == "hybrid"} == {4}
    assert {config.sharding.shard_size for config in found if config.sharding.strategy != "hybrid"} == {None}
    assert all(config.model.compile for config in found)
    halved = changed(CONFIG, sharding={"reduce_dtype": "bf16"})
    for config in candidates(halved, CLUSTER):
        check_config(config)
        assert config.sharding.reduce_dtype == ("fp32" if config.sharding.strategy == "none" else "bf16")
    found = candidates(CONFIG, Cluster(CPU, 2))  # where nothing is offloaded
    assert not any(config.sharding.cpu_offload for config in found)
    assert "offload" not in {config.model.activation_checkpointing for config in found}


def test_the_users_setting_is_the_cheapest_if_it_fits_and_a_faster_one_is_named(shape, stand_ins) -> None:
    found = find(shape, CONFIG)
    assert found.cheapest is found.own and found.own.config == CONFIG
    assert found.own.memory.total == 8 + 8 and found.own.largest_rows == 8  # 64 examples on 8 devices need no more
    assert found.faster and overrides(found.faster.config, CONFIG) == ["model.activation_checkpointing=none"]
    assert found.lighter is None  # fewer bytes per parameter bring no speed here


def test_the_fastest_with_the_same_precision_comes_before_fewer_bytes(shape, stand_ins) -> None:
    stand_ins.scale = 80  # 16N under full: 80, grad_op: 120
    own = changed(CONFIG, sharding={"strategy": "grad_op"})
    found = find(shape, own)
    assert not found.own.fits and found.own.rate == 0
    assert found.cheapest
    # full at 16N holds 80 + 8; with `none` (64) and `selective` (32) it would not fit.
    assert set(overrides(found.cheapest.config, own)) == {"sharding.strategy=full"}
    assert found.lighter is None  # none at 6N: 30 + 64, 102 tokens/s, less than 1.25 x 82
    stand_ins.speeds["none"] = 110.0
    found = find(shape, own)
    assert found.lighter and found.lighter.bytes_per_parameter == 6


def test_the_most_bytes_that_are_fast_enough_are_proposed(shape, stand_ins) -> None:
    stand_ins.scale = 48  # under full 48 at 16N, 36 at 12N, 24 at 8N
    stand_ins.speeds["none"] = 200.0
    stand_ins.speeds["selective"] = 80.0
    found = find(shape, CONFIG)
    assert found.cheapest is found.own and found.lighter
    assert found.lighter.config.optimizer.memory == "12N" and found.lighter.memory.total == 36 + 64


def test_fewer_bytes_only_if_nothing_else_fits_and_then_as_many_as_possible(shape, stand_ins) -> None:
    stand_ins.scale = 112  # under full: 16N 112, 14N 98, 12N 84
    found = find(shape, CONFIG, dataclasses.replace(CLUSTER, host_memory=999))
    assert found.cheapest and set(overrides(found.cheapest.config, CONFIG)) == {"optimizer.memory=12N"}
    assert not any(setting.fits for setting in found.plans if setting.config.sharding.cpu_offload)
    with_host = find(shape, CONFIG)  # of unknown size
    assert with_host.cheapest and with_host.cheapest.config.sharding.cpu_offload
    assert with_host.cheapest.config.optimizer.memory == "16N"
    assert with_host.lighter and with_host.lighter.config.optimizer.memory == "12N"


def test_what_is_slow_with_the_users_micro_batch_may_be_the_cheapest_with_a_larger_one(shape, stand_ins) -> None:
    stand_ins.scale = 112  # 16N fits with host offload alone, where `full` is the slowest but one with one row
    stand_ins.gain_of["full"] = 3.0
    found = find(shape, CONFIG)
    assert found.cheapest and found.cheapest.config.sharding.cpu_offload
    assert found.cheapest.config.model.activation_checkpointing == "full" and found.cheapest.config.batch.rows > 1
    assert found.faster is None


def test_ranks_share_a_micro_batch_before_it_is_offloaded_or_precision_is_given_up(shape, stand_ins) -> None:
    stand_ins.scale, stand_ins.shared = (
        80,
        True,
    )  # 16N has 80 bytes of state under full; a row keeps 4 bytes at the least
    tight = Cluster(dataclasses.replace(DEVICE, memory=83), 8)
    found = find(shape, CONFIG, tight)
    assert found.own.memory.total == 88 and found.cheapest
    shared = {"sharding.context=2", "model.activation_checkpointing=offload"}  # 80 + 4 / 2
    assert set(overrides(found.cheapest.config, CONFIG)) == shared
    assert {setting.config.sharding.context for setting in found.plans} == {1, 2}
    assert {setting.config.sharding.context for setting in find(shape, CONFIG).plans} == {1}  # it fits
    alone = find(shape, CONFIG, dataclasses.replace(tight, devices=1, device=dataclasses.replace(DEVICE, memory=9)))
    assert {setting.config.sharding.context for setting in alone.plans} == {1}


def test_a_user_of_12n_gets_12n_or_more(shape, stand_ins) -> None:
    stand_ins.scale = 80
    own = changed(CONFIG, optimizer={"memory": "12N"}, sharding={"strategy": "none"})
    found = find(shape, own)
    assert found.cheapest and found.cheapest.bytes_per_parameter >= 12
    # selective at 12N: 60 + 32; at 14N 70 + 32 does not fit.
    assert found.cheapest.config.optimizer.memory == "12N"
    assert found.cheapest.config.model.activation_checkpointing == "selective"


def test_a_micro_batch_that_does_not_fit_is_made_smaller_and_one_that_gains_is_made_larger(shape, stand_ins) -> None:
    large = changed(CONFIG, batch={"micro_batch": 8}, model={"activation_checkpointing": "none"})
    found = find(shape, large)
    assert not found.own.fits and found.own.config == large and found.own.memory.total == 8 + 8 * 64
    same = next(s for s in found.plans if s.config.model.activation_checkpointing == "none" and s.fits)
    assert same.config.batch.micro_batch == 1 == same.largest_rows
    stand_ins.gain = 1.5
    found = find(shape, CONFIG)
    # selective holds two rows (95 x 1.5 tokens/s), none holds one (100 tokens/s).
    assert found.faster
    assert set(overrides(found.faster.config, CONFIG)) == {
        "model.activation_checkpointing=selective",
        "batch.micro_batch=2",
    }


def test_auto_takes_the_largest_micro_batch_that_fits_and_is_useful(shape, stand_ins) -> None:
    auto = changed(CONFIG, batch={"micro_batch": "auto"})
    assert find(shape, auto).own.config.batch.micro_batch == 8
    none = changed(auto, model={"activation_checkpointing": "none"})
    assert find(shape, none).own.config.batch.micro_batch == 1


def test_the_nearest_says_how_many_devices_or_how_much_host_memory(shape, stand_ins) -> None:
    stand_ins.scale = 800  # under full at 16N: 8 devices need 804, 64 devices 104, 96 devices fewer
    cluster = dataclasses.replace(CLUSTER, host_memory=10)
    found = find(shape, CONFIG, cluster)
    assert (found.cheapest, found.faster, found.lighter) == (None, None, None) and found.nearest
    assert found.nearest.memory.total == 804 and found.nearest.config.model.activation_checkpointing == "offload"
    assert found.devices == 96
    assert found.with_more_host and found.with_more_host.host == {"offload": 1000}
    assert found.with_more_host.config.sharding.cpu_offload and found.with_more_host.fits_device
    stand_ins.scale = 8000000
    assert find(shape, CONFIG, cluster).devices is None


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

    def deal(step: int):
        return dealer.deal(plan.batch(step).items, corpus, ranks)

    return Inputs(corpus, plan, max_steps or plan.num_steps, 0, None, None, dealer, deal, None)


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


def large(cluster: Cluster, **sections: dict) -> Plan:
    config = changed(CONFIG, **sections)
    llama = named_config("135M")
    shape = shape_of(build_on_meta(llama), llama)
    return Plan(
        Subject(config, shape, cluster, lambda rows, context: uniform_workload(shape, 64, 64, 64, 1, 1, 1), []), config
    )


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
    assert host["forgetting"] == tokens * (2 * 49152 + 8) and plan.FORGETTING_BYTES == forgetting.TEXT_BYTES
    assert plan.TASK_TOKENS == forgetting.TASK_TOKENS
    offload = large(two, sharding={"cpu_offload": True})
    exact = 2 * 8 * count  # of two ranks in fp32: half of the weights, gradients and moments each
    assert exact <= offload.host["offload"] < 1.6 * exact  # pinned tensors are rounded up to a power of two
    assert not sum(large(dataclasses.replace(two, device=CPU), sharding={"cpu_offload": True}).host.values())
    size = large(two, optimizer={"memory": "8N"}, run={"keep_last": 3}).disk
    assert size["checkpoint"] == pytest.approx(6 * count, rel=1e-4)
    assert size["export"] == 2 * count and size["run"] == 5 * size["checkpoint"]


def test_on_a_cpu_memory_is_a_range_whose_end_must_fit() -> None:
    small = large(Cluster(CPU, 1))
    least, most = small.needed
    assert least == small.memory.total and most == round(plan.CPU_EXCESS * least)
    for memory, fits in ((most, True), (most - 1, False)):
        assert large(Cluster(dataclasses.replace(CPU, memory=memory), 1)).fits == fits
    on_gpu = large(Cluster(DEVICE, 1))
    assert on_gpu.needed == (on_gpu.memory.total,) * 2


def test_a_plan_beside_a_run(tmp_path, monkeypatch) -> None:
    rows = [
        {"step": step, "train/tokens": 100 * step, "train/tokens_per_second": speed, "train/memory_gib": 4.0}
        for step, speed in ((2, 1.0), (4, 100.0), (6, 50.0))  # the first row holds what happens once
    ]
    lines = [json.dumps(row) for row in [rows[0], {"step": 2, "validation/loss": 1.0}, *rows[1:]]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = measured(tmp_path)
    assert found == {"steps": 4, "tokens_per_second": 400 / (200 / 100 + 200 / 50), "memory_gib": 4.0}
    memory = StepMemory(2**31, 0, 0, 0, 0, 0, 2**30, 0, 2**30, 2**30)
    monkeypatch.setattr(plan, "step_memory", lambda *arguments: memory)
    monkeypatch.setattr(plan, "expected_speed", lambda *arguments: Speed((30.0, 40.0), (1.0, 2.0), {}, 35.0))
    said = beside(large(dataclasses.replace(CLUSTER, devices=2)), found)
    assert said == (
        "planned against measured (4 steps): peak memory 3.0 and 4.0 GiB (-25%); 60 to 80 and 67 tokens/s, in the range"
    )
    assert "5.0 to 11.0 and 4.0 GiB; 30 to 40 and 67 tokens/s, outside of the range" in beside(
        large(Cluster(CPU, 1)), found
    )
