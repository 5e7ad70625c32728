"""EWC on several ranks. Each case writes its Fisher diagonal, gradients and curves, which test_ewc.py compares.

    torchrun --nproc_per_node=N tests/distributed/ewc_worker.py plan.json

plan.json is a list of cases: a model, how to shard it, and what to do with it. All cases share one launch.
"""

import json
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import distributed.sharding
from common.errors import exit_process
from configs.config import EWC
from data.batches import collate
from data.dealing import Dealer, one_per_token
from data.tokens import load_tokenizer
from distributed.gradients import gradient_norm
from distributed.process_group import Ranks, agree_any, start_process_group
from distributed.sharding import before_micro_batch, local_shard
from model.architectures import read_model_config
from model.ewc import Penalty, start_penalty
from model.language_model import build_on_meta, load_weights, parameter_names
from tests.in_memory import load_documents
from tests.losses import loss_of
from tests.sharded import shard_model

COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "all_gather_into_tensor",  # torch < 2.13
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
)
CALLED: list[str] = []


class Stop:
    """A StopSignal that only the last rank receives, after `after` calls of `agreed`."""

    def __init__(self, after: int | None, ranks: Ranks) -> None:
        self.ranks = ranks
        self.left = after if after and ranks.rank == ranks.world_size - 1 else None

    def agreed(self) -> bool:
        if self.left is not None:
            self.left -= 1
        return agree_any(self.left is not None and self.left < 0, self.ranks)


def make_model(case: dict, ranks: Ranks) -> torch.nn.Module:
    model = build_on_meta(read_model_config(case["model"])).to(getattr(torch, case.get("dtype", "float32")))
    if case.get("mean"):
        distributed.sharding.sum_gradients, keep = lambda model: None, distributed.sharding.sum_gradients
    strategy, shard_size = case.get("strategy", "full"), case.get("shard_size")
    shard_model(model, ranks, strategy, shard_size, case.get("cpu_offload", False))
    if case.get("mean"):
        distributed.sharding.sum_gradients = keep
    load_weights(model, case["model"], torch.device("cpu"))
    return model


def whole(tensors: dict[str, torch.Tensor], penalty: Penalty) -> dict[str, torch.Tensor]:
    """Gather local shards into whole fp32 tensors."""
    found = {}
    for name, local in tensors.items():
        parameter = penalty.parameters[name]
        local = local.float()
        shape = {"shape": parameter.shape, "stride": parameter.stride()}
        mesh, placements = parameter.device_mesh, parameter.placements
        found[name] = DTensor.from_local(local, mesh, placements, run_check=False, **shape).full_tensor()
    return found


def run(case: dict, ranks: Ranks) -> None:
    model, folder, strategy = make_model(case, ranks), Path(case["folder"]), case.get("strategy", "full")
    documents = load_documents((case["data"],), load_tokenizer(case["model"]), 256, "error")
    if case.get("evaluate_before"):  # leaves the parameters gathered
        with torch.no_grad():
            loss_of(model, collate((0, 1), documents))
    settings = EWC(**({"strength": 20.0, "data": ("old",), "documents": 8} | case.get("ewc", {})))
    packing = case.get("packing", True)
    old_domain, dealer = None if settings.fisher else documents, Dealer(256 if packing else 1, one_per_token, packing)
    log = []
    stop = Stop(case.get("stop_after"), ranks)
    penalty = start_penalty(model, settings, folder / "ewc", old_domain, dealer, strategy, stop, log.append)
    if penalty is None:
        (folder.with_suffix(f".stopped{ranks.rank}")).touch()
        return
    result = {f"fisher.{n}": f for n, f in whole(penalty.anchor.fisher, penalty).items()}
    if case.get("train"):
        # Move the weights off the reference by an amount that does not depend on the number of ranks.
        parameters = parameter_names(model)
        with torch.no_grad():
            for index, parameter in enumerate(parameters.values()):
                local, _, start = local_shard(parameter)
                rows = torch.arange(start, start + local.shape[0]).view(-1, *[1] * (local.dim() - 1))
                local += (0.01 * torch.sin(rows.double() + index)).to(local.dtype)
        if case.get("evaluate"):
            with torch.no_grad():
                loss_of(model, collate((0, 1), documents))
        collectives = count_collectives()
        for last in (False, True):
            before_micro_batch(model, strategy, last)
            mine = range(4 * last + ranks.rank, 4 * last + 4, ranks.world_size)
            (loss_of(model, collate(tuple(mine), documents)) / 100).backward()
        plain = {n: local_shard(p.grad)[0].clone() for n, p in parameters.items()}
        assert collectives or ranks.world_size == 1
        collectives.clear()
        penalty.add_gradient(step=0)
        assert not collectives, f"add_gradient called {collectives}"
        result |= {f"plain.{n}": g for n, g in whole(plain, penalty).items()}
        result |= {
            f"grad.{n}": g
            for n, g in whole({n: local_shard(p.grad)[0] for n, p in parameters.items()}, penalty).items()
        }
        result |= {f"reference.{n}": r for n, r in whole(penalty.anchor.reference, penalty).items()}
        result |= {
            f"weight.{n}": w for n, w in whole({n: local_shard(p)[0] for n, p in parameters.items()}, penalty).items()
        }
        row = penalty.curves(seconds_per_step=10.0)
        row["norm"] = float(gradient_norm(parameters.values()))
        if ranks.rank == 0:
            folder.with_suffix(".json").write_text(json.dumps(row))
    if ranks.rank == 0:
        save_file({n: t.contiguous() for n, t in result.items()}, folder.with_suffix(".safetensors"))
        folder.with_suffix(".log").write_text("\n".join(log))


def count_collectives() -> list[str]:
    """Clear `CALLED` and return it. From now on every call of a collective appends its name to it."""
    for name in COLLECTIVES:
        original = getattr(torch.distributed, name, None)
        if original and not hasattr(original, "counted"):

            def counted(*arguments, original=original, name=name, **options) -> object:
                CALLED.append(name)
                return original(*arguments, **options)

            counted.counted = True
            setattr(torch.distributed, name, counted)
    CALLED.clear()
    return CALLED


def main() -> None:
    ranks = start_process_group()
    torch.set_num_threads(1)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(case, ranks)
    torch.distributed.destroy_process_group()
    exit_process(0)


if __name__ == "__main__":
    main()
