"""All of train.py on a pretended GPU (pretend_device.py): the CUDA path with real numbers, and the host's waits for the device."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import largest_difference, launch, relative_difference, rows, run_of, weights, workplace
from tests.processes import run_python, run_ranks

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("pretend_worker.py")
QUIET = "step 2"  # not logged, hence without any wait
EWC, OTHER_EWC = ("ewc.strength=1.0", "ewc.documents=2", "ewc.batch=2"), ("ewc.device=cpu",)
BF16 = "model.compute_dtype=bf16"
ALONE = "data.validation="  # without evaluations: fp32, bf16 and ewc have them
# Operators that raise on CUDA under run.deterministic:
# https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html
NOT_DETERMINISTIC = "put_ histc bincount kthvalue median cumsum nll_loss2d_forward scatter_reduce".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return workplace(
        tmp_path_factory.mktemp("pretended"),
        24,
        3,
        model={"family": "mistral_sliding", "tied": False, "vocab_size": 391},
        data="packing=True",
        micro_batch=1,
        optimizer="max_steps=3, max_grad_norm=0.5",
        run="log_every=100",
        more='ewc=EWC(data=(here + "/validation.jsonl",)),',
    )


def pretend(folder: Path, world_size: int, runs: dict[str, tuple[str, ...]]) -> dict[str, dict]:
    """Run train.py with the overrides of each name. Return name -> waits and operators of the last rank."""
    plan = folder / f"on-{world_size}.json"
    plan.write_text(json.dumps([run_of(folder, name, *runs[name]) for name in runs]))
    process = run_python(WORKER, plan) if world_size == 1 else run_ranks(world_size, WORKER, plan)
    assert process.returncode == 0, (process.stdout + process.stderr)[-6000:]
    return dict(zip(runs, json.loads(plan.with_suffix(f".{world_size - 1}.waits.json").read_text()), strict=True))


@pytest.fixture(scope="module")
def on_one_rank(folder) -> dict[str, dict]:
    deterministic = ("run.deterministic=True", "optimizer.skip_spikes=9")
    runs = {
        "fp32": (),
        "bf16": (BF16, *deterministic, "model.activation_checkpointing=selective"),
        "ewc": (BF16, *EWC, "optimizer.memory=12N", "run.eval_general=True"),
        "14N": (BF16, ALONE, *EWC, *OTHER_EWC, "optimizer.memory=14N", "model.activation_checkpointing=full"),
        "6N": (BF16, ALONE, "optimizer.memory=6N", "model.activation_checkpointing=offload"),
        "offload": (BF16, ALONE, "sharding.cpu_offload=True"),
    }
    return pretend(folder, 1, runs)


def waits(report: dict) -> list[list[str]]:
    return [wait for wait in report["waits"] if wait[0] == QUIET]


@pytest.mark.parametrize("name", ["fp32", "bf16", "ewc", "14N", "6N"])
def test_unlogged_step_waits_once_for_the_device(on_one_rank, name) -> None:
    """The loop waits for the loss and the gradient norm, to decide whether it skips the step."""
    assert [place.split(":")[0] for _, _, place in waits(on_one_rank[name])] == ["train.py"]
    logged = {place.split(":")[0] for phase, _, place in on_one_rank[name]["waits"] if phase == "step 3"}
    assert "train.py" in logged  # a logged step waits, and the waits are recorded


def test_bf16_runs_the_varlen_kernel_and_its_backward(on_one_rank) -> None:
    kernels = {"torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"}
    assert kernels.isdisjoint(on_one_rank["fp32"]["operators"])
    assert all(kernels <= set(on_one_rank[name]["operators"]) for name in ("bf16", "ewc", "14N", "6N", "offload"))


def test_deterministic_run_has_no_refused_operator(on_one_rank) -> None:
    refused = {f"aten::{name}" for name in NOT_DETERMINISTIC}
    assert all(refused.isdisjoint(on_one_rank[name]["operators"]) for name in ("fp32", "bf16", "ewc", "14N", "6N"))


def test_host_offload_waits_only_for_gradients(on_one_rank) -> None:
    """The host waits for the gradients that FSDP adds there (all micro-batches but the first), and once for the norm."""
    places = {place for _, _, place in waits(on_one_rank["offload"])}
    assert {place.split(":")[0] for place in places} == {"train.py"} and len(places) == 2


def test_cuda_path_gives_the_cpu_update(folder, on_one_rank) -> None:
    """fp32 agrees up to rounding. bf16 compares the varlen kernel's mathematics (windows, grouped heads) with torch's products."""
    launch(folder, "cpu", 1, [run_of(folder, "cpu"), run_of(folder, "cpu-bf16", BF16)])
    runs = folder / "runs"
    assert largest_difference(weights(runs / "cpu"), weights(runs / "fp32")) < 1e-6
    assert relative_difference(rows(runs / "cpu"), rows(runs / "fp32"), "train/loss") < 1e-5
    assert relative_difference(rows(runs / "cpu-bf16"), rows(runs / "bf16"), "train/loss") < 1e-2
    assert relative_difference(rows(runs / "cpu-bf16"), rows(runs / "bf16"), "train/grad_norm") < 5e-2


def test_two_ranks_with_gradients_that_are_reduced(folder, on_one_rank) -> None:
    strategies = ("full", "none")
    on_two_ranks = pretend(folder, 2, {s: (f"sharding.strategy={s}", "batch.micro_batch=1") for s in strategies})
    for strategy in strategies:
        assert len(waits(on_two_ranks[strategy])) == 1, waits(on_two_ranks[strategy])
        assert largest_difference(weights(folder / "runs" / "fp32"), weights(folder / "runs" / strategy)) < 1e-5
