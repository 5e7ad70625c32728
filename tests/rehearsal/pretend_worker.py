"""Runs of train.py on a pretended GPU: pretend_worker.py PLAN.json, as tests/distributed/train_worker.py.

Writes what made the host wait, and the operators that ran, to PLAN.RANK.waits.json.
"""

import json
import os
import sys
import traceback
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import pytest
import torch

import eval.forgetting
import model.flops
import train
from distributed.watch import Watch
from model.loss import LossSums
from tests.code_memory import remember_code
from tests.rehearsal.pretended_cuda import pretend_device


def plant(name: str | None, patch: pytest.MonkeyPatch) -> None:
    """Plant a fault of the CUDA path."""
    if name == "item":  # the loop reads a number in every step
        original = train.gradient_norm

        def reading(parameters) -> torch.Tensor:
            norm = original(parameters)
            return norm if norm.item() >= 0 else norm

        patch.setattr(train, "gradient_norm", reading)
    elif name == "host_sums":  # the sums of the losses stay on the host
        patch.setattr(train, "LossSums", lambda sources, device: LossSums(sources, torch.device("cpu")))
    elif name:
        raise ValueError(name)


def main() -> None:
    plan = Path(sys.argv[1])
    remember_code()
    eval.forgetting.TEXT_BYTES = 2048  # few texts and questions, as in train_worker.py
    read_questions = eval.forgetting.read_questions
    eval.forgetting.read_questions = lambda: read_questions()[:8]
    reports = []
    for run in json.loads(plan.read_text()):
        with pytest.MonkeyPatch.context() as patch, pretend_device() as device:
            at = Watch.at

            def watched(watch, where, at=at, device=device) -> None:
                device.phase = where
                at(watch, where)

            patch.setattr(model.flops, "measured_flops", lambda device, dtype, size: 1e12)
            patch.setattr(Watch, "at", watched)
            patch.setattr(sys, "argv", ["train.py", *run["arguments"]])
            plant(run.get("plant"), patch)
            error = None
            try:
                code = train.main()
            except Exception as problem:  # a fault that CUDA would report
                code, error = 1, f"{type(problem).__name__}: {problem}"
                traceback.print_exc()
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
        reports.append({"code": code, "error": error, "waits": device.waits, "operators": sorted(device.operators)})
    plan.with_suffix(f".{os.environ.get('RANK', 0)}.waits.json").write_text(json.dumps(reports, indent=1))


main()
