"""model.compile in runs of train.py on two ranks: a layer is compiled once and gives the updates of eager code."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import largest_difference, launch, relative_difference, rows, run_of, weights, workplace

pytestmark = pytest.mark.slow
GRAPHS = "count_graphs:aot_eager"  # traces like inductor, without a minute for generating C++
CAPTURED = "count_graphs:eager"  # only captures the graphs, in a fifth of the time


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compile")
    alike = {"family": "qwen2", "vocab_size": 391}  # all layers are alike; tests/model/test_compile.py has two kinds
    more = 'ewc=EWC(data=(here + "/validation.jsonl",), documents=4, batch=2),'
    run, steps = "eval_every=1, save_every=2", "max_steps=3"
    return workplace(
        folder, 24, 4, model=alike, data="", batch="global_examples=8", optimizer=steps, run=run, more=more
    )


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    ewc, lora, plain = "ewc.strength=1.0", ("lora.rank=4", "data.validation="), "data.validation="
    full, selective = (
        ("model.compile=True", f"model.activation_checkpointing={mode}") for mode in ("full", "selective")
    )
    plan = [
        run_of(folder, "eager", ewc),
        run_of(folder, "shared", ewc, *full, "sharding.context=2", plant=CAPTURED),
        run_of(folder, "eager-lora", *lora),
        run_of(folder, "lora", *lora, *selective, plant=CAPTURED),
        run_of(folder, "eager-plain", plain),
        run_of(folder, "plain", plain, *selective, plant=GRAPHS),
    ]
    launch(folder, "two", 2, plan)
    return folder / "runs"


def graphs(folder: Path, name: str) -> list[int]:
    """Return the number of graphs after each forward. Check that it is the same on both ranks."""
    first, second = (json.loads((folder / f"{name}.graphs.{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return first


@pytest.mark.parametrize("name, eager", [("shared", "eager"), ("lora", "eager-lora"), ("plain", "eager-plain")])
def test_compiled_layers_give_the_same_update(runs, name, eager) -> None:
    """With the Fisher of EWC, evaluations, ranks that share their tokens, and adapters.

    AdamW divides a gradient by its own size, so rounding grows where a gradient is near zero: 2.3e-6 was seen on a processor
    with AVX512-BF16, below 1e-6 with AMX. A wrong gradient moves weights by the learning rate, 1e-3.
    """
    assert largest_difference(weights(runs / eager), weights(runs / name)) < 1e-5
    for key in ("train/loss", "train/grad_norm", *(("validation/loss",) if name == "shared" else ())):
        assert relative_difference(rows(runs / eager, key), rows(runs / name, key), key) < 1e-5


def test_lengths_steps_and_evaluations_compile_nothing_again(folder, runs) -> None:
    """There is a graph for training and a graph for evaluation, which runs first in `shared` and last in the other runs.

    `lora` has a third graph, because the input of its first layer needs no gradient.
    """
    for name, kinds, forwards in (("shared", {1, 2}, 14), ("lora", {2, 3}, 8), ("plain", {1, 2}, 8)):
        counts = graphs(folder, name)
        assert counts == sorted(counts) and set(counts) == kinds
        assert len(counts) >= forwards
