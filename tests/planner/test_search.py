"""Which settings are tried, which of them fit, and which is the cheapest. Memory and speed are stand-ins with round figures."""

import dataclasses

import pytest
from transformers import LlamaConfig

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding
from configs.loading.checks import check_config, check_world
from configs.loading.config_file import override
from planner import search
from planner.cluster import Cluster, Device
from planner.memory import DeviceMemory, HostMemory
from planner.search import MEMORIES, Search, candidates, nearest, overrides
from planner.shape import shape_of
from planner.step_time import Speed
from planner.workload import uniform_workload

DEVICE = Device("card", "cuda", memory=100, flops=1e12, bandwidth=1e12, link=1e9)
CLUSTER = Cluster(DEVICE, 8)
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
    gain: float = 1.0  # of more than one row
    gain_of: dict[str, float] = dataclasses.field(default_factory=dict)  # the same, of one kind of checkpointing alone
    speeds: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"none": 100.0, "selective": 95.0, "full": 80.0, "offload": 60.0}
    )

    def bytes(self, config: Config, cluster: Cluster, rows: int) -> int:
        state = self.scale * STATE[config.sharding.strategy] * int(config.optimizer.memory[:-1]) / 16
        state *= 8 / cluster.devices
        kept = KEPT[config.model.activation_checkpointing] * config.model.checkpoint_every
        return int(0 if config.sharding.cpu_offload else state) + rows * kept

    def device_memory(self, shape, config, cluster, load) -> DeviceMemory:
        return DeviceMemory(self.bytes(config, cluster, max(1, load.tokens // 128)), *[0] * 9)

    def host_memory(self, shape, config, cluster, load) -> HostMemory:
        return HostMemory(1000 if config.sharding.cpu_offload else 0, 0, 0, 0, 0)

    def largest_rows(self, shape, config, cluster, at_most) -> int:
        fitting = [rows for rows in range(1, at_most + 1) if self.bytes(config, cluster, rows) <= cluster.device.memory]
        return max(fitting, default=0)

    def expected_speed(self, shape, config, cluster, workload) -> Speed:
        tokens = self.speeds[config.model.activation_checkpointing] * (0.1 if config.sharding.cpu_offload else 1)
        if config.batch.rows > 1:
            tokens *= self.gain_of.get(config.model.activation_checkpointing, self.gain)
        tokens += {"full": 2, "hybrid": 1}.get(config.sharding.strategy, 0)
        return Speed((tokens, tokens), (1.0, 1.0), {}, tokens)


@pytest.fixture
def stand_ins(monkeypatch) -> StandIns:
    found = StandIns()
    for name in ("device_memory", "host_memory", "largest_rows", "expected_speed"):
        monkeypatch.setattr(search, name, getattr(found, name))
    return found


@pytest.fixture(scope="module")
def shape():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=99
    )
    return shape_of("tiny", config)


def search_of(shape, cluster=CLUSTER) -> Search:
    def workloads(rows: int):
        return uniform_workload(shape, 64, 128, 64, 1, rows, cluster.devices)

    return Search(shape, cluster, workloads)


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
    found = search_of(shape, cluster).find(own)
    rows = {
        setting.config.model.activation_checkpointing: (setting.largest_rows, setting.config.batch.micro_batch)
        for setting in found.settings
        if setting.config.sharding == own.sharding and setting.config.optimizer.memory == "16N"
    }
    assert rows["selective"] == (3, 2)
    proposed = [setting for setting in (found.cheapest, found.faster, found.lighter) if setting]
    assert proposed
    for setting in (*found.settings[1:], *proposed):
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


def test_on_a_cpu_nothing_is_offloaded() -> None:
    cpu = Cluster(dataclasses.replace(DEVICE, kind="cpu"), 2)
    found = candidates(CONFIG, cpu)
    assert not any(config.sharding.cpu_offload for config in found)
    assert "offload" not in {config.model.activation_checkpointing for config in found}


def test_the_users_setting_is_the_cheapest_if_it_fits_and_a_faster_one_is_named(shape, stand_ins) -> None:
    found = search_of(shape).find(CONFIG)
    assert found.cheapest is found.own and found.own.config == CONFIG
    assert found.own.memory.total == 8 + 8 and found.own.largest_rows == 8  # 64 examples on 8 devices need no more
    assert found.faster and overrides(found.faster.config, CONFIG) == ["model.activation_checkpointing=none"]
    assert found.lighter is None  # fewer bytes per parameter bring no speed here


def test_the_fastest_with_the_same_precision_comes_before_fewer_bytes(shape, stand_ins) -> None:
    stand_ins.scale = 80  # 16N under full: 80, grad_op: 120
    own = changed(CONFIG, sharding={"strategy": "grad_op"})
    found = search_of(shape).find(own)
    assert not found.own.fits and found.own.speed is None
    assert found.cheapest
    # full at 16N holds 80 + 8; with `none` (64) and `selective` (32) it would not fit.
    assert set(overrides(found.cheapest.config, own)) == {"sharding.strategy=full"}
    assert found.lighter is None  # none at 6N: 30 + 64, 102 tokens/s, less than 1.25 x 82
    stand_ins.speeds["none"] = 110.0
    found = search_of(shape).find(own)
    assert found.lighter and found.lighter.bytes_per_parameter == 6


def test_the_most_bytes_that_are_fast_enough_are_proposed(shape, stand_ins) -> None:
    stand_ins.scale = 48  # under full 48 at 16N, 36 at 12N, 24 at 8N
    stand_ins.speeds["none"] = 200.0
    stand_ins.speeds["selective"] = 80.0
    found = search_of(shape).find(CONFIG)
    assert found.cheapest is found.own and found.lighter
    assert found.lighter.config.optimizer.memory == "12N" and found.lighter.memory.total == 36 + 64


def test_fewer_bytes_only_if_nothing_else_fits_and_then_as_many_as_possible(shape, stand_ins) -> None:
    stand_ins.scale = 112  # under full: 16N 112, 14N 98, 12N 84
    found = search_of(shape, dataclasses.replace(CLUSTER, host_memory=999)).find(CONFIG)
    assert found.cheapest and set(overrides(found.cheapest.config, CONFIG)) == {"optimizer.memory=12N"}
    assert not any(setting.fits for setting in found.settings if setting.config.sharding.cpu_offload)
    with_host = search_of(shape).find(CONFIG)  # of unknown size
    assert with_host.cheapest and with_host.cheapest.config.sharding.cpu_offload
    assert with_host.cheapest.config.optimizer.memory == "16N"
    assert with_host.lighter and with_host.lighter.config.optimizer.memory == "12N"


def test_what_is_slow_with_the_users_micro_batch_may_be_the_cheapest_with_a_larger_one(shape, stand_ins) -> None:
    stand_ins.scale = 112  # 16N fits with host offload alone, where `full` is the slowest but one with one row
    stand_ins.gain_of["full"] = 3.0
    found = search_of(shape).find(CONFIG)
    assert found.cheapest and found.cheapest.config.sharding.cpu_offload
    assert found.cheapest.config.model.activation_checkpointing == "full" and found.cheapest.config.batch.rows > 1
    assert found.faster is None


def test_a_user_of_12n_gets_12n_or_more(shape, stand_ins) -> None:
    stand_ins.scale = 80
    own = changed(CONFIG, optimizer={"memory": "12N"}, sharding={"strategy": "none"})
    found = search_of(shape).find(own)
    assert found.cheapest and found.cheapest.bytes_per_parameter >= 12
    # selective at 12N: 60 + 32; at 14N 70 + 32 does not fit.
    assert found.cheapest.config.optimizer.memory == "12N"
    assert found.cheapest.config.model.activation_checkpointing == "selective"


def test_a_micro_batch_that_does_not_fit_is_made_smaller_and_one_that_gains_is_made_larger(shape, stand_ins) -> None:
    large = changed(CONFIG, batch={"micro_batch": 8}, model={"activation_checkpointing": "none"})
    found = search_of(shape).find(large)
    assert not found.own.fits and found.own.config == large and found.own.memory.total == 8 + 8 * 64
    same = next(s for s in found.settings if s.config.model.activation_checkpointing == "none" and s.fits)
    assert same.config.batch.micro_batch == 1 == same.largest_rows
    stand_ins.gain = 1.5
    found = search_of(shape).find(CONFIG)
    # selective holds two rows (95 x 1.5 tokens/s), none holds one (100 tokens/s).
    assert found.faster
    assert set(overrides(found.faster.config, CONFIG)) == {
        "model.activation_checkpointing=selective",
        "batch.micro_batch=2",
    }


def test_auto_takes_the_largest_micro_batch_that_fits_and_is_useful(shape, stand_ins) -> None:
    auto = changed(CONFIG, batch={"micro_batch": "auto"})
    assert search_of(shape).find(auto).own.config.batch.micro_batch == 8
    none = changed(auto, model={"activation_checkpointing": "none"})
    assert search_of(shape).find(none).own.config.batch.micro_batch == 1


def test_the_nearest_says_how_many_devices_or_how_much_host_memory(shape, stand_ins) -> None:
    stand_ins.scale = 800  # under full at 16N: 8 devices need 804, 64 devices 104, 96 devices fewer
    cluster = dataclasses.replace(CLUSTER, host_memory=10)
    searched = search_of(shape, cluster)
    found = searched.find(CONFIG)
    assert found.cheapest is None and found.faster is None and found.lighter is None
    closest = nearest(searched, found)
    assert closest.setting.memory.total == 804 and closest.setting.config.model.activation_checkpointing == "offload"
    assert closest.devices == 96
    assert closest.with_more_host and closest.with_more_host.host.total == 1000
    assert closest.with_more_host.config.sharding.cpu_offload and closest.with_more_host.fits_device
    stand_ins.scale = 8000000
    assert nearest(searched, searched.find(CONFIG)).devices is None


def test_sharding_defaults_are_those_of_the_search() -> None:
    assert Sharding().strategy in search.STRATEGIES and CONFIG.optimizer.memory in MEMORIES
