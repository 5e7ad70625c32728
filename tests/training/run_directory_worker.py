"""Two ranks start in run directories that they may not have; each writes what it got to RESULT.rank<rank>.json.

    torchrun --nproc_per_node=2 tests/training/run_directory_worker.py OWNED FILE FREE RESULT

OWNED is owned by another process, FILE is no directory, and in FREE a start is recorded.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.errors import UserError, exit_process
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.sources import Corpus
from distributed.process_group import start_process_group
from training.log import Log
from training.owner import own_directory
from training.provenance import record_start
from training.record import RunRecord

owned, file, free, result = map(Path, sys.argv[1:])
ranks = start_process_group()
answers = {}


def start_in(directory: Path) -> None:
    record = RunRecord(directory, Corpus(()), ranks)
    record.step = 3
    config = Config(Model("."), Data(()), Batch(1), Optimizer(1e-3), Run("r"))
    identity = {"the code": {}, "the weights": {}}
    log = SimpleNamespace(kept=lambda *more: b"", say=print)
    record_start(config, SimpleNamespace(local=config), identity, {}, record, log)


try:
    with own_directory(owned, ranks, wait_seconds=0):
        answers["owned"] = "entered"
except UserError as error:
    answers["owned"] = str(error)
for name, start in {
    "log": lambda: Log(file, ranks).open(0, {}, 4),
    "provenance": lambda: start_in(file),
    "owner": lambda: own_directory(file, ranks).__enter__(),
}.items():
    try:
        start()
    except UserError as error:
        answers[name] = str(error)
with own_directory(free, ranks):
    start_in(free)
result.with_suffix(f".rank{ranks.rank}.json").write_text(json.dumps(answers))
exit_process(0)
