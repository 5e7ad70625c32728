"""The program that tests/eval/test_forgetting.py runs on 1 and 2 gloo processes: forgetting_worker.py FOLDER.

It shards a model as train.py does, with each strategy, computes the base's distributions, replaces the weights with
those of another directory, and measures forgetting. The results go to FOLDER/<world size>.<rank>.json.
"""

import json
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import torch.distributed as dist

from common.errors import exit_process
from data.dealing import Dealer, one_per_token
from data.tokens import load_tokenizer
from distributed.process_group import StopSignal, start_process_group
from eval import forgetting
from eval.questions import read_questions
from model.architectures import first_new_row, read_model_config
from model.language_model import build_on_meta, load_weights
from tests.sharded import shard_model

folder = Path(sys.argv[1])
ranks = start_process_group()
stop = StopSignal(ranks)
forgetting.split_into_pieces = lambda texts: json.loads((folder / "texts.json").read_text())
forgetting.read_questions = lambda: read_questions()[::4]
results = {}
cases = [("base", "full", False), ("base", "none", False), ("untied", "full", True), ("extended", "full", False)]
for name, strategy, offload in cases:
    path = str(folder / name)
    model = build_on_meta(read_model_config(path))
    shard_model(model, ranks, strategy, cpu_offload=offload)
    load_weights(model, path, ranks.device)
    model.train()
    tokenizer = load_tokenizer(path)
    reference = forgetting.start_forgetting(model, tokenizer, Dealer(128, one_per_token), stop, first_new_row(path))
    unchanged = forgetting.measure_forgetting(reference, model, stop)
    load_weights(model, f"{path}-tuned", ranks.device)
    tuned = forgetting.measure_forgetting(reference, model, stop)
    assert model.training
    sharded = all(type(p).__name__ == "DTensor" for p in model.parameters())
    results[f"{name} {strategy}{' offload' if offload else ''}"] = {
        "unchanged": unchanged,
        "tuned": tuned,
        "sharded": sharded,
        "host_bytes": reference.host_bytes,
        "line": reference.line(),
    }
stop.name = "SIGTERM" if ranks.rank == ranks.world_size - 1 else None  # only one rank receives the signal
results["stopped"] = forgetting.measure_forgetting(reference, model, stop)
results["stopped at the start"] = forgetting.measure_forgetting(
    forgetting.start_forgetting(model, tokenizer, Dealer(128, one_per_token), stop), model, stop
)
(folder / f"{ranks.world_size}.{ranks.rank}.json").write_text(json.dumps(results))
dist.destroy_process_group()
exit_process(0)
