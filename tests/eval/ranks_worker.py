"""The program that tests/eval/test_forgetting.py runs on 1 and 3 gloo processes: ranks_worker.py FOLDER.

It evaluates the models of FOLDER whole and sharded, counts the bytes of parameters that each rank holds, measures forgetting as
train.py does, with each strategy, and stops after a signal that one rank receives. The results go to
FOLDER/<world size>.<rank>.json.
"""

import functools
import json
import os
import signal
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from common.errors import UserError, exit_process
from data.dealing import Dealer, length_as_cost
from data.tokens import load_tokenizer
from distributed.process_group import StopSignal, start_process_group
from eval import forgetting, load_over_ranks
from eval.compare_models import ModelAndTokenizer, compare_models
from eval.generate import greedy_answers, stop_tokens
from eval.load_over_ranks import agreed_dtype, load_causal_lm, load_packed
from eval.over_ranks import compute_over_ranks
from eval.questions import read_questions
from eval.target_losses import target_losses
from model.architectures import first_new_row, read_model_config
from model.language_model import build_on_meta, load_weights
from tests.sharded import shard_model
from tests.tiny import SENTENCES

folder = Path(sys.argv[1])
ranks = start_process_group()
is_last = ranks.rank == ranks.world_size - 1
# Sequences of very different lengths, so that ranks have different numbers of batches and of tokens to generate.
SEQUENCES = [
    ([(7 * i + j) % 380 for j in range(length)], [True] * length) for i, length in enumerate((3, 40, 9, 25, 5))
]


def held_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of this rank's shards, and of the parameters that are gathered at the moment."""
    parts = [(isinstance(one, DTensor), one) for one in model.parameters()]
    sharded = sum(one.to_local().nbytes for is_sharded, one in parts if is_sharded)
    return sharded, sum(one.nbytes for is_sharded, one in parts if not is_sharded)


def evaluate(name: str, sharded: bool, dtype: torch.dtype, count: int) -> dict:
    model, stop = load_causal_lm(str(folder / name), dtype, sharded, ranks)
    before, gathered = held_bytes(model), [0]  # at every forward of a module without children
    for module in model.modules() if sharded else ():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_: gathered.append(held_bytes(model)[1]))
    chosen = SEQUENCES[:count]
    prompts = [ids for ids, _ in chosen]
    lengths = [len(ids) for ids in prompts]
    losses = compute_over_ranks(functools.partial(target_losses, model), chosen, lengths, ranks, "losses", stop)
    stops = stop_tokens(model, [2]) | {int(token) for token in (folder / f"{name}.stops").read_text().split()}
    answers = compute_over_ranks(
        lambda batch: greedy_answers(model, batch, stops, 4, stop),
        prompts,
        [length + 4 for length in lengths],
        ranks,
        "answers",
        stop,
        max_items=2,
    )
    nats, after = [loss.nats for loss in losses], held_bytes(model)
    return {"losses": nats, "answers": answers, "before": before, "after": after, "gathered": max(gathered)}


def with_tokenizer(path: Path, sharded: bool) -> ModelAndTokenizer:
    model = load_packed(read_model_config(str(path)), str(path), torch.float32, sharded, ranks)
    return ModelAndTokenizer(model, load_tokenizer(str(path)))


def compare(sharded: bool, count: int) -> dict:
    pair = [with_tokenizer(folder / name, sharded) for name in ("padded", "padded-tuned")]
    questions = read_questions()[: 2 * count : 2]
    return compare_models(pair[0], pair[1], SENTENCES[:count], questions, StopSignal(ranks))


def answer_unequally() -> dict:
    """The second rank's answer ends 50 tokens or more after the first rank's; the last rank has no prompt."""
    whole, _ = load_causal_lm(str(folder / "base"), torch.float32, False, ranks)
    model, _ = load_causal_lm(str(folder / "base"), torch.float32, True, ranks)
    prompts = [ids for ids, _ in SEQUENCES]
    free = greedy_answers(whole, prompts, set(), 60)
    short, long = next((i, j) for i in range(5) for j in range(5) if free[i][2] not in free[j])
    pair, stop_ids = [prompts[short], prompts[long]], {free[short][2]}
    answers = greedy_answers(model, pair[ranks.rank :][:1], stop_ids, 60)
    return {"sharded": answers, "whole": greedy_answers(whole, pair, stop_ids, 60)}


def stopped() -> str:
    """The last rank alone receives a signal, in the middle of its first answer."""
    model, stop = load_causal_lm(str(folder / "base"), torch.float32, True, ranks)
    forwards = []

    def count(*_: object) -> None:
        forwards.append(1)
        if is_last and len(forwards) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    model.register_forward_hook(count)

    def answers(batch: list) -> list:
        return greedy_answers(model, batch, set(), 5, stop)

    try:
        prompts = [ids for ids, _ in SEQUENCES] * 2
        compute_over_ranks(answers, prompts, [len(ids) + 5 for ids in prompts], ranks, "answers", stop, max_items=1)
    except KeyboardInterrupt:
        return f"stopped after {len(forwards)} forwards"
    return "not stopped"


def stopped_comparison() -> str:
    stop = StopSignal(ranks)
    stop.name = "SIGTERM" if is_last else None
    one = with_tokenizer(folder / "base", True)
    try:
        compare_models(one, one, SENTENCES, read_questions(), stop)
    except KeyboardInterrupt:
        return "stopped"
    return "not stopped"


def missing_on_last_rank(sharded: bool) -> str:
    try:
        load_causal_lm(str(folder / ("broken" if is_last else "base")), torch.float32, sharded, ranks)
    except UserError as error:
        return str(error)
    return "loaded"


def measure_in_training() -> dict:
    """Shard a model, compute the base's distributions, replace the weights with tuned ones, measure; stop in the end."""
    stop, found, dealer = StopSignal(ranks), {}, Dealer(128, length_as_cost)
    forgetting.split_into_pieces = lambda texts: json.loads((folder / "texts.json").read_text())
    forgetting.read_questions = lambda: read_questions()[::16]
    cases = [("base", "full", False), ("base", "none", False), ("untied", "full", True), ("extended", "full", False)]
    for name, strategy, offload in cases:
        path = str(folder / name)
        model = build_on_meta(read_model_config(path))
        shard_model(model, ranks, strategy, cpu_offload=offload)
        load_weights(model, path, ranks.device)
        model.train()
        tokenizer = load_tokenizer(path)
        reference = forgetting.start_forgetting(model, tokenizer, dealer, stop, first_new_row(path))
        unchanged = forgetting.measure_forgetting(reference, model, stop)
        load_weights(model, f"{path}-tuned", ranks.device)
        tuned = forgetting.measure_forgetting(reference, model, stop)
        assert model.training and all(type(p).__name__ == "DTensor" for p in model.parameters())
        case = {"unchanged": unchanged, "tuned": tuned, "host_bytes": reference.host_bytes}
        found[f"{name} {strategy}{' offload' if offload else ''}"] = case
    stop.name = "SIGTERM" if is_last else None
    found["stopped"] = [
        forgetting.measure_forgetting(reference, model, stop),
        forgetting.measure_forgetting(forgetting.start_forgetting(model, tokenizer, dealer, stop), model, stop),
    ]
    return found


results = {"training": measure_in_training()}
several = ranks.world_size > 1
for sharded in {False, several}:
    kind = "sharded" if sharded else "whole"
    for name in ("base", "untied"):
        results[f"{name} {kind}"] = evaluate(name, sharded, torch.float32, 5)
    results[f"base bf16 {kind}"] = evaluate("base", sharded, torch.bfloat16, 2)
    results[f"few {kind}"] = evaluate("base", sharded, torch.float32, 2)
    results[f"forgetting {kind}"] = compare(sharded, 4)
if several:
    results["one sharded"] = evaluate("base", True, torch.float32, 1)
    results["forgetting one sharded"] = compare(True, 1)
    load_over_ranks.choose_dtype = lambda name, device: torch.float32 if ranks.rank == 1 else torch.bfloat16
    results["agreed dtype"] = str(agreed_dtype("auto", ranks))
    results["missing"] = [missing_on_last_rank(sharded) for sharded in (True, False)]
    results["unequal answers"] = answer_unequally()
    results["stopped"] = [stopped(), stopped_comparison()]
(folder / f"{ranks.world_size}.{ranks.rank}.json").write_text(json.dumps(results))
dist.destroy_process_group()
exit_process(0)
