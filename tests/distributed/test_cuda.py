"""Tests that need a GPU: host offload, a single wait for the device per step, compile, bitwise resume. On a GPU machine:

    bash scripts/test.sh -m gpu

They run one process on one GPU, and two processes (NCCL) if there are two GPUs. The runs are tiny; scripts/bench.py measures
performance.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import largest_difference, launch, relative_difference, rows, run_of, weights, workplace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
BF16 = ("model.compute_dtype=bf16",)
SPIKES = ("optimizer.skip_spikes=9",)  # in a run this short, the history is too short to detect a spike
DETERMINISTIC = (*BF16, "run.deterministic=True", "run.save_every=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write the workplace of a run with 6 steps, which are all clipped."""
    model = {"family": "qwen2", "tied": False, "vocab_size": 391, "layers": 4}
    folder, optimizer = tmp_path_factory.mktemp("cuda"), "epochs=2, max_grad_norm=0.5"
    return workplace(folder, 24, model=model, batch="global_examples=8", optimizer=optimizer)


@pytest.fixture(scope="module")
def on_one_gpu(folder) -> Path:
    """Run on one GPU, with 8 micro-batches per step. `stopped` is stopped in step 4 and resumed."""
    launch(
        folder,
        "one",
        1,
        [
            run_of(folder, "base"),
            run_of(folder, "offload", "sharding.cpu_offload=True"),
            run_of(folder, "activations", "model.activation_checkpointing=offload"),
            run_of(folder, "bf16", *BF16),
            run_of(folder, "compiled", *BF16, "model.compile=True", "model.activation_checkpointing=full"),
            run_of(folder, "12N", *BF16, "optimizer.memory=12N"),
            # The first step (forwards 0 to 7) and the last (40 to 47) are logged, and may wait more than once.
            run_of(folder, "no-wait", *BF16, *SPIKES, "run.log_every=100", plant="no_device_wait:9,39"),
            run_of(folder, "straight", *DETERMINISTIC),
            run_of(folder, "stopped", *DETERMINISTIC, plant="signal_at_micro_batch:29"),
            run_of(folder, "stopped", *DETERMINISTIC, "run.async_save=True"),
        ],
    )
    return folder / "runs"


def test_cpu_offload_gives_the_same_clipped_update(on_one_gpu) -> None:
    assert largest_difference(weights(on_one_gpu / "base"), weights(on_one_gpu / "offload")) < 1e-5
    assert relative_difference(rows(on_one_gpu / "base"), rows(on_one_gpu / "offload"), "train/grad_norm") < 1e-5
    assert all(row["train/grad_norm"] > 0.5 for row in rows(on_one_gpu / "base").values())


def test_activation_offload_gives_the_same_update(on_one_gpu) -> None:
    assert largest_difference(weights(on_one_gpu / "base"), weights(on_one_gpu / "activations")) < 1e-5


def test_bf16_and_compiled_losses_match_fp32(on_one_gpu) -> None:
    for name in ("bf16", "compiled", "12N"):
        assert relative_difference(rows(on_one_gpu / "base"), rows(on_one_gpu / name), "train/loss") < 2e-2


def test_a_step_waits_for_the_device_once(on_one_gpu) -> None:
    # Another wait would have been an error.
    assert largest_difference(weights(on_one_gpu / "bf16"), weights(on_one_gpu / "no-wait")) < 1e-3


def test_resume_is_bitwise_with_run_deterministic(folder, on_one_gpu) -> None:
    assert "SIGTERM: stopped after step 3/6, saved" in (folder / "one.out").read_text()
    assert largest_difference(weights(on_one_gpu / "straight"), weights(on_one_gpu / "stopped")) == 0.0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["full", "grad_op", "none"])
def test_two_gpus_give_the_same_update_as_one(folder, on_one_gpu, on_two_gpus, strategy) -> None:
    assert largest_difference(weights(on_one_gpu / "base"), weights(on_two_gpus / strategy)) < 1e-5


@pytest.fixture(scope="module")
def on_two_gpus(folder) -> Path:
    launch(folder, "two", 2, [run_of(folder, s, f"sharding.strategy={s}") for s in ("full", "grad_op", "none")])
    return folder / "runs"
