"""Run train.py on a pretended GPU: pretend_worker.py PLAN.json, like tests/distributed/train_worker.py.

The worker writes the operations that made the host wait, and the names of all operators, to PLAN.RANK.waits.json.
"""

import json
import os
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import pytest

import eval.forgetting
import model.flops
import train
from distributed.watch import Watch
from tests.code_memory import remember_code
from tests.rehearsal.pretended_cuda import pretend_device


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
            assert train.main() == 0
        reports.append({"waits": device.waits, "operators": sorted(device.operators)})
    plan.with_suffix(f".{os.environ.get('RANK', 0)}.waits.json").write_text(json.dumps(reports, indent=1))


main()
