"""Saves and loads of the training state: any optimizer, registered objects, saves in the background, bytes read, failures."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import default_planner, staging

from common.errors import UserError
from configs.config import Optimizer
from distributed import checkpoint, checkpoint_directory
from distributed.checkpoint import Saver
from distributed.checkpoint_directory import latest_checkpoint, read_manifest
from distributed.optimizer import adamw, check_optimizer
from distributed.process_group import disagreement, flatten
from tests.distributed.test_checkpoint_directory import weight_and_optimizer

# --- Any optimizer ---


class Adapting(torch.optim.Optimizer):
    """Keeps scalars in its groups, as Prodigy and schedule-free optimizers do, and a plain counter in its state."""

    def __init__(self, parameters, lr=1e-2, decay=0.1) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay, "k": 0, "d": 1e-6, "betas": (0.9, 0.99), "weights": []})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["d"] = group["d"] * 1.5 + 1e-3
            group["betas"] = (0.9, 1 - 1 / (1 + group["k"]))
            group["weights"] = [*group["weights"], group["d"]]
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state.setdefault("sum", torch.zeros_like(p)).add_(p.grad)
                p.mul_(1 - group["lr"] * group["decay"]).sub_(state["sum"], alpha=group["d"] * state["count"])


class Lookahead(torch.optim.SGD):
    """Makes a state in its second step that it has not after the first."""

    def step(self) -> None:  # without a closure
        super().step()
        for parameter in self.param_groups[0]["params"]:
            if "seen" in self.state[parameter]:
                slow = self.state[parameter].setdefault("slow", torch.zeros_like(parameter))
                parameter.data.copy_(slow.lerp_(parameter.detach(), 0.5))
            self.state[parameter]["seen"] = torch.ones(())


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-2, decoupled_weight_decay=True, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "plain SGD": lambda p: torch.optim.SGD(p, 1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "Adapting": Adapting,
    "Lookahead": lambda p: Lookahead(p, 1e-2),
}


def make(name: str) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = {"matrix": nn.Parameter(torch.randn(8, 6)), "vector": nn.Parameter(torch.randn(6))}
    return parameters, OPTIMIZERS[name](list(parameters.values()))


def take_steps(parameters: dict, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_updates_as_without_us(name, tmp_path, ranks) -> None:
    bare, bare_optimizer = make(name)
    ours, optimizer = make(name)
    saver = Saver(tmp_path, ours, optimizer, ranks)
    assert saver.load(None) == [] and saver.stored_bytes() > 0
    for steps in (range(1), range(1, 4)):
        take_steps(bare, bare_optimizer, steps)
        take_steps(ours, optimizer, steps)
        assert all(torch.equal(ours[key], bare[key]) for key in bare), steps  # the first update, too
    saver.save({"step": 4})
    resumed, new_optimizer = make(name)
    (line,) = Saver(tmp_path, resumed, new_optimizer, ranks).load(tmp_path / "step-000004")
    assert "have their checksums" in line
    assert new_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for steps in (range(0), range(4, 7)):
        take_steps(bare, bare_optimizer, steps)
        take_steps(resumed, new_optimizer, steps)
        assert all(torch.equal(resumed[key], bare[key]) for key in bare), steps


def test_later_saves_reuse_the_first_plan(tmp_path, ranks, monkeypatch) -> None:
    """A plan for 512 ranks takes minutes. torch would take the plan of fp32 for bf16 of the same shape."""
    plans_made, make_plan = [], default_planner.create_default_global_save_plan
    monkeypatch.setattr(
        default_planner, "create_default_global_save_plan", lambda plans: plans_made.append(plans) or make_plan(plans)
    )
    for dtype, folder in ((torch.float32, tmp_path / "a"), (torch.bfloat16, tmp_path / "b")):
        weight = nn.Parameter(torch.arange(64).to(dtype))
        saver = Saver(folder, {"weight": weight}, torch.optim.SGD([weight], 0.1), ranks, 9)
        for step in (1, 2, 3):
            weight.data += step
            saver.save({"step": step})
        for step, value in ((1, 1), (2, 3), (3, 6)):
            saver.load(folder / f"step-00000{step}")
            assert torch.equal(weight.detach(), (torch.arange(64) + value).to(dtype))
    assert len(plans_made) == 2


def test_unchanged_settings_come_from_the_new_start(tmp_path, ranks) -> None:
    parameters, optimizer = make("Adapting")
    saver = Saver(tmp_path, parameters, optimizer, ranks)
    take_steps(parameters, optimizer, range(2))
    saver.save({"step": 2})
    resumed, _ = make("Adapting")
    new_optimizer = Adapting(list(resumed.values()), lr=5.0, decay=0.7)
    Saver(tmp_path, resumed, new_optimizer, ranks).load(tmp_path / "step-000002")
    values = [new_optimizer.param_groups[0][key] for key in ("lr", "decay", "k", "betas")]
    assert values == [5.0, 0.7, 2, (0.9, 1 - 1 / 3)]


def test_unstorable_values_are_refused(tmp_path, ranks) -> None:
    parameters, optimizer = make("Adam")
    optimizer.param_groups[0]["scale"] = torch.ones(())
    with pytest.raises(UserError, match="Adam keeps scale in param_groups as a tensor"):
        Saver(tmp_path, parameters, optimizer, ranks)
    parameters, optimizer = make("Adam")
    saver = Saver(tmp_path, parameters, optimizer, ranks)
    optimizer.param_groups[0]["note"] = object()
    with pytest.raises(UserError, match="Adam has changed note in param_groups to a value of type object"):
        saver.save({"step": 1})
    del optimizer.param_groups[0]["note"]
    optimizer.state[parameters["vector"]]["history"] = {1, 2}
    with pytest.raises(UserError, match="optimizer: 'history.vector' is of type set; a checkpoint stores"):
        saver.save({"step": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ("NAdam", "SGD", "optimizer NAdam, now SGD; it has optimizer.exp_avg"),
        ("plain SGD", "NAdam", "optimizer SGD, now NAdam"),
        ("SGD", "plain SGD", "it has optimizer.momentum_buffer, and the run has not"),
    ],
)
def test_resume_with_another_optimizer_is_refused(before, now, words, tmp_path, ranks) -> None:
    parameters, optimizer = make(before)
    saver = Saver(tmp_path, parameters, optimizer, ranks)
    take_steps(parameters, optimizer, range(1))
    saver.save({"step": 1})
    with pytest.raises(UserError, match=words):
        Saver(tmp_path, *make(now), ranks).load(tmp_path / "step-000001")


def test_optimizer_has_exactly_the_trained_parameters(ranks) -> None:
    parameters, optimizer = make("Adam")
    matrix = {"matrix": parameters["matrix"]}
    model = nn.Module()
    model.matrix, model.vector = parameters.values()
    check_optimizer(optimizer, parameters, model, "16N", ranks)
    for tried, trained, memory, words in (
        (torch.optim.Adam(matrix.values()), parameters, "16N", "lacks 1 of 2 trained parameters, such as vector: add"),
        (optimizer, matrix, "16N", "Adam has a parameter that is not trained; give it `parameters` alone"),
        (optimizer, parameters, "8N", "8N is a format of this project's AdamW; with Adam set optimizer.memory=16N"),
        (torch.optim.LBFGS(parameters.values()), parameters, "16N", "LBFGS computes the loss again in its step; the"),
    ):
        with pytest.raises(UserError, match=words):
            check_optimizer(tried, trained, nn.Module(), memory, ranks)
    model.value_head = nn.Linear(2, 1)  # which an edited train.py has added
    with pytest.raises(UserError, match="value_head.weight has a gradient and is not in `parameters`"):
        check_optimizer(optimizer, parameters, model, "16N", ranks)


def test_group_rates_must_agree_on_all_ranks(ranks, monkeypatch) -> None:
    parameters, compared = make("Adam")[0], []
    monkeypatch.setattr("distributed.optimizer.check_agreement", lambda values, ranks: compared.append(flatten(values)))
    for rate in (1e-3, 2e-3):
        check_optimizer(torch.optim.Adam(parameters.values(), lr=rate), parameters, torch.nn.Module(), "16N", ranks)
    problem = disagreement([("a", compared[0]), ("b", compared[1])])
    assert problem and "make_optimizer" in problem and "0.001" in problem and "0.002" in problem


# --- What is registered ---


class Thing:
    """A registered object with this state."""

    def __init__(self, **state: object) -> None:
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def test_registered_state_keeps_its_types(tmp_path, ranks) -> None:
    state = {"mean": torch.arange(3.0), "count": 7, "rate": 0.1, "name": "x", "on": True, "last": [1, 2], "none": None}
    saver = Saver(tmp_path, *weight_and_optimizer(1.0), ranks)
    before = saver.stored_bytes()
    saver.register("sampler", Thing(**state))
    assert saver.stored_bytes() == before + 12
    saver.save({"step": 1})
    loaded = Thing(mean=torch.zeros(3), count=0, rate=0, name="", on=False, last=[], none=1)
    resumed = Saver(tmp_path, *weight_and_optimizer(0.0), ranks)
    resumed.register("sampler", loaded)
    resumed.load(tmp_path / "step-000001")
    assert torch.equal(loaded.state.pop("mean"), state.pop("mean")) and loaded.state == state
    assert all(type(loaded.state[key]) is type(value) for key, value in state.items())


def test_unstorable_registration_is_refused(tmp_path, ranks) -> None:
    saver = Saver(tmp_path, *weight_and_optimizer(1.0), ranks)
    for value, kind in ({1, 2}, "set"), ((1, 2), "tuple"), ({"a": torch.ones(1)}, "dict"), (b"", "bytes"):
        with pytest.raises(UserError, match=rf"registered.a: 'key' is of type {kind}; a checkpoint stores"):
            saver.register("a", Thing(key=value))
    changing = Thing(key=torch.zeros(0))
    saver.register("a", changing)
    changing.state["key"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"registered.a.key was \(0,\) float32 and is \(3,\) float32 now"):
        saver.save({"step": 1})
    saver = Saver(tmp_path, *weight_and_optimizer(1.0), ranks)
    saver.register("a", Thing(key=1))
    with pytest.raises(UserError, match="register.*a Generator has no state_dict"):
        saver.register("generator", torch.Generator())
    with pytest.raises(UserError, match=r"register\('a'\): choose a name without a dot that nothing else has"):
        saver.register("a", Thing(key=1))
    saver.load(None)
    with pytest.raises(UserError, match=r"register\('b'\): register before the checkpoint is loaded"):
        saver.register("b", Thing(key=1))


def test_resume_with_other_registrations_is_refused(tmp_path, ranks) -> None:
    plain, with_ema = (Saver(tmp_path, *weight_and_optimizer(1.0), ranks, 9) for _ in range(2))
    with_ema.register("ema", Thing(key=1))
    with_ema.save({"step": 1})
    plain.save({"step": 2})
    with pytest.raises(UserError, match="it has registered.ema, and the run has not"):
        plain.load(tmp_path / "step-000001")
    with pytest.raises(UserError, match="it has no registered.ema"):
        with_ema.load(tmp_path / "step-000002")


# --- Bytes, damage ---


def test_load_finds_a_flipped_bit_anywhere(tmp_path, ranks, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_directory, "BLOCK", 2**14)  # above the buffer of a BufferedReader
    weights = {f"w{i}": nn.Parameter(torch.randn(50 + 6131 * i)) for i in range(9)}
    saver = Saver(tmp_path, weights, adamw(weights, Optimizer(1.0), seed=0), ranks)
    saver.save({"step": 1})
    checkpoint, read = tmp_path / "step-000001", []
    block = checkpoint_directory.CheckedFile._block

    def counted(file, number: int) -> memoryview:
        if number not in file.blocks:
            read.append((file.path.name, number))
        return block(file, number)

    monkeypatch.setattr(checkpoint_directory.CheckedFile, "_block", counted)
    fresh = {name: nn.Parameter(torch.zeros_like(weight)) for name, weight in weights.items()}
    resumed = Saver(tmp_path, fresh, adamw(fresh, Optimizer(1.0), seed=0), ranks)
    resumed.load(checkpoint)
    assert all(torch.equal(fresh[name], weights[name]) for name in weights)
    files = read_manifest(checkpoint)["files"]
    blocks = [(name, number) for name in files for number in range(len(files[name]["sha256"]))]
    assert sorted(read) == sorted(blocks) and len(blocks) > 70
    data = checkpoint / "__0_0.distcp"
    whole = data.read_bytes()
    for position in range(100, len(whole), 250_013):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        data.write_bytes(damaged)
        with pytest.raises(UserError, match="__0_0.distcp is damaged: its checksum is .*; run.resume=previous"):
            resumed.load(checkpoint)


# --- In the background ---


@pytest.fixture
def held(monkeypatch) -> threading.Event:
    """Background saves wait for this event before they write."""
    event, write = threading.Event(), Saver._write

    def wait_then_write(*arguments) -> str:
        assert event.wait(60)
        return write(*arguments)

    monkeypatch.setattr(Saver, "_write", wait_then_write)
    return event


def test_background_save_stores_the_state_of_its_step(tmp_path, ranks, held) -> None:
    parameters, optimizer = weight_and_optimizer(1.0)
    saver = Saver(tmp_path, parameters, optimizer, ranks, 2, True)
    registered = Thing(positions=[1])
    saver.register("thing", registered)
    state = {"step": 1, "loop": {"step": 1}}
    saver.save(state)
    with torch.no_grad():
        parameters["weight"].fill_(2.0)  # training goes on
    state["loop"]["step"] = 2
    registered.state["positions"].append(2)
    assert saver.poll() == [] and latest_checkpoint(tmp_path) is None
    held.set()
    (times,) = saver.close()
    assert times.step == 1 and 0 < times.pause < times.total
    assert latest_checkpoint(tmp_path).name == "step-000001"
    assert read_manifest(tmp_path / "step-000001")["state"]["loop"] == {"step": 1}
    resumed = weight_and_optimizer(0.0)
    resumed_saver = Saver(tmp_path, *resumed, ranks)
    resumed_saver.register("thing", registered)
    resumed_saver.load(tmp_path / "step-000001")
    assert resumed[0]["weight"].unique().tolist() == [1.0] and registered.state == {"positions": [1]}


def test_background_thread_uses_the_gpu_of_its_rank(tmp_path, ranks, monkeypatch) -> None:
    chosen, synchronized = [], []
    stager = SimpleNamespace(stage=lambda tensors, non_blocking: tensors, close=lambda: None, pin_memory=True)
    monkeypatch.setattr(checkpoint, "StateDictStager", lambda pin_memory: stager)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1, dtype=torch.uint8))
    thread = threading.current_thread
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((thread().name, device)))
    on_gpu = dataclasses.replace(ranks, device=torch.device("cuda", 3))
    saver = Saver(tmp_path, *weight_and_optimizer(1.0), on_gpu, 9, True)
    saver.save({"step": 1})
    assert [times.step for times in saver.close()] == [1]
    assert chosen == [("save_0", torch.device("cuda", 3))]
    assert synchronized == [torch.device("cuda", 3)]  # the copies are complete before training goes on


def test_background_saves_avoid_the_default_stager(tmp_path, ranks, monkeypatch) -> None:
    def stage(stager: staging.DefaultStager, tensors: dict) -> dict:  # as in torch 2.11 and 2.12
        copies = stager._state_dict_stager.stage(tensors)
        stager._state_dict_stager.close()
        return copies

    monkeypatch.setattr(staging.DefaultStager, "_stage", stage)
    saver = Saver(tmp_path, *weight_and_optimizer(1.0), ranks, 9, True)
    for step in (1, 2):
        saver.save({"step": step})
    assert [times.step for times in saver.close()] == [1, 2]


def test_save_waits_for_the_previous_save(tmp_path, ranks, held) -> None:
    saver = Saver(tmp_path, *weight_and_optimizer(1.0), ranks, 9, True)
    saver.save({"step": 1})
    held.set()
    saver.save({"step": 2})
    saver.update_state({"step": 2, "best_step": 2})
    assert [times.step for times in saver.close()] == [1, 2]
    assert read_manifest(tmp_path / "step-000002")["state"] == {"step": 2, "best_step": 2}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save")]


@pytest.mark.parametrize("in_background", [False, True])
def test_failed_save_ends_the_run(in_background, tmp_path, ranks, monkeypatch) -> None:
    saver = Saver(tmp_path, *weight_and_optimizer(1.0), ranks, 9, in_background)
    saver.save({"step": 1})
    saver.wait()

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", fail)
    with pytest.raises(UserError, match="the checkpoint of step 2 could not be written .*Input/output error"):
        saver.save({"step": 2})
        saver.wait()
    assert latest_checkpoint(tmp_path).name == "step-000001"
