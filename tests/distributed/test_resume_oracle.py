"""Right after loading, before any update, the training state equals the saved one to the bit, for every optimizer.memory.

What is compared are digests of every tensor of the state: this
rank's part of each parameter and moment, the step counters, the random state. On another number of ranks the whole tensors
are compared. This file is also its own worker (the last lines).
"""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import exit_process
from data.batches import MicroBatch
from distributed.checkpoint import Saver
from distributed.optimizer import adamw, parameter_dtype
from distributed.process_group import Ranks, start_process_group
from distributed.sharding import flat_shard, local
from model.architectures import read_model_config
from model.language_model import build_on_meta, load_weights, parameter_names
from tests.losses import loss_of
from tests.processes import ROOT, run_ranks
from tests.sharded import shard_model
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.slow
FORMS = ("16N", "14N", "12N", "8N", "6N")
STEPS = 3


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict[tuple[str, str], list[dict[str, str]]]:
    """(state, memory) -> by rank: name in the training state -> digest. `fresh` is what `loaded` had before loading."""
    folder = tmp_path_factory.mktemp("oracle")
    # 66 rows per head matrix do not divide evenly, and a norm has fewer elements than a block of 8-bit moments.
    write_tiny_model(folder / "model", hidden=48)
    for world_size, names in ((2, "saved,loaded"), (1, "alone")):
        done = run_ranks(world_size, __file__, folder, names, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-3000:]
    return {
        (name, memory): [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.{memory}.rank*.json"))]
        for name in ("saved", "fresh", "loaded", "alone")
        for memory in FORMS
    }


def parts(state: dict[str, str], kind: str) -> dict[str, str]:
    return {name: digest for name, digest in state.items() if name.startswith(kind)}


@pytest.mark.parametrize("memory", FORMS)
def test_every_part_of_the_state_equals_the_saved_one_on_the_same_number_of_ranks(states, memory) -> None:
    saved, loaded, fresh = (states[name, memory] for name in ("saved", "loaded", "fresh"))
    assert len(saved) == len(loaded) == 2
    for rank in range(2):
        assert loaded[rank] == saved[rank]
        assert parts(loaded[rank], "parameter.") and parts(loaded[rank], "moment.") and parts(loaded[rank], "step.")
        # Nothing is equal by chance: before loading every digest was another one.
        assert [name for name in saved[rank] if fresh[rank][name] == saved[rank][name]] == []
    assert saved[0]["random"] != saved[1]["random"]


@pytest.mark.parametrize("memory", FORMS)
def test_one_rank_loads_the_whole_tensors_that_two_have_saved(states, memory) -> None:
    (alone,) = states["alone", memory]
    saved = states["saved", memory][0]
    assert len(parts(alone, "whole.")) > 40
    for kind in ("whole.", "step.", "random"):  # rank 0 gets the random state of rank 0
        assert parts(alone, kind) == parts(saved, kind)


def digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content).hexdigest()


def digests(parameters: dict, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Of everything that the next update depends on."""
    found = {"random": digest(torch.get_rng_state())}
    for name, parameter in parameters.items():
        values = {f"parameter.{name}": parameter} | {
            f"moment.{key}.{name}": value for key, value in optimizer.state[parameter].items() if key != "step"
        }
        for key, value in values.items():
            found[key] = digest(local(value))
            found[f"whole.{key}"] = digest(value.full_tensor() if hasattr(value, "full_tensor") else value)
        found[f"step.{name}"] = digest(optimizer.state[parameter]["step"])
    return found


def take_step(model, parameters: dict, optimizer: torch.optim.Optimizer, step: int, ranks: Ranks) -> None:
    """A forward, a backward and an update, with other tokens on every rank."""
    ids = torch.randint(3, 300, (1, 24))
    batch = MicroBatch(
        input_ids=ids,
        position_ids=torch.arange(24)[None],
        document_lengths=(24,),
        cu_seq_lens=torch.tensor([0, 24], dtype=torch.int32),
        target_positions=torch.arange(23),
        target_ids=ids[0, 1:],
    )
    (loss_of(model, batch) / 23).backward()
    for group in optimizer.param_groups:
        group["noise_step"] = step
    optimizer.step()
    optimizer.zero_grad()


def work(folder: Path, name: str, ranks: Ranks) -> None:
    for memory in FORMS:
        torch.manual_seed((7 if name == "saved" else 8) + ranks.rank)
        model = build_on_meta(read_model_config(folder / "model")).to(parameter_dtype(memory))
        shard_model(model, ranks)
        load_weights(model, folder / "model", ranks.device, ranks.device)
        parameters = parameter_names(model)
        settings = SimpleNamespace(memory=memory, learning_rate=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        optimizer = adamw(parameters, settings, seed=0)
        saver = Saver(folder / memory, parameters, optimizer, ranks)
        if name == "saved":
            for step in range(STEPS):
                take_step(model, parameters, optimizer, step, ranks)
            saver.save({"step": STEPS})
        else:
            with torch.no_grad():
                for parameter in parameters.values():  # whatever has not been loaded stays visible
                    for value in (parameter, *optimizer.state[parameter].values()):
                        shard = flat_shard(value)[0] if value.dim() else value
                        shard.fill_(5)
            if name == "loaded":
                write(folder / f"fresh.{memory}.rank{ranks.rank}.json", digests(parameters, optimizer))
            saver.load(folder / memory / f"step-{STEPS:06d}")
        write(folder / f"{name}.{memory}.rank{ranks.rank}.json", digests(parameters, optimizer))


def write(path: Path, found: dict[str, str]) -> None:
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    of_this_launch = start_process_group()
    for each in sys.argv[2].split(","):
        work(Path(sys.argv[1]), each, of_this_launch)
    torch.distributed.destroy_process_group()
    exit_process(0)
