"""The program that tests/eval/test_sharded.py runs on 1 and 3 gloo processes: sharded_worker.py FOLDER.

It evaluates the models of FOLDER whole and sharded, counts the bytes of parameters that each rank holds, and stops after a
signal that one rank receives. The results go to FOLDER/<world size>.<rank>.json.
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
from data.tokens import load_tokenizer
from distributed.process_group import StopSignal, start_process_group
from eval import load_over_ranks
from eval.compare_models import ModelAndTokenizer, compare_models
from eval.generate import greedy_answers, stop_tokens
from eval.load_over_ranks import agreed_dtype, load_causal_lm, load_packed
from eval.over_ranks import compute_over_ranks
from eval.perplexity import target_losses
from eval.questions import read_questions
from model.architectures import read_model_config
from tests.tiny import SENTENCES

folder = Path(sys.argv[1])
ranks = start_process_group()
# Sequences of very different lengths, so that ranks have different numbers of batches and of tokens to generate.
SEQUENCES = [
    ([(7 * i + j) % 380 for j in range(length)], [True] * length) for i, length in enumerate((3, 40, 9, 25, 5))
]


def held_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of this rank's shards, and of the parameters that are gathered at the moment."""
    sharded = gathered = 0
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            sharded += parameter.to_local().nbytes
        else:
            gathered += parameter.nbytes
    return sharded, gathered


def watch(model: torch.nn.Module) -> list[int]:
    """The list to which every forward of a module without children appends the bytes that are gathered then."""
    seen: list[int] = []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_: seen.append(held_bytes(model)[1]))
    return seen


def evaluate(name: str, sharded: bool, dtype: torch.dtype, count: int) -> dict:
    model, finish = load_causal_lm(str(folder / name), dtype, sharded, ranks)
    before, seen = held_bytes(model), watch(model) if sharded else []
    chosen = SEQUENCES[:count]
    prompts = [ids for ids, _ in chosen]
    lengths = [len(ids) for ids in prompts]
    losses = compute_over_ranks(functools.partial(target_losses, model), chosen, lengths, ranks, "losses", finish)
    stops = stop_tokens(model, [2]) | {int(token) for token in (folder / f"{name}.stops").read_text().split()}
    answers = compute_over_ranks(
        lambda share, advance: greedy_answers(model, share, stops, 4, 2, advance),
        prompts,
        [length + 4 for length in lengths],
        ranks,
        "answers",
        finish,
    )
    return {
        "losses": [loss.nats for loss in losses],
        "answers": answers,
        "bytes": before,
        "bytes after": held_bytes(model),
        "most gathered": max(seen, default=0),
    }


def compare(sharded: bool, count: int) -> dict:
    path = str(folder / "padded")
    pair = [
        ModelAndTokenizer(load_packed(read_model_config(p), p, torch.float32, sharded, ranks), load_tokenizer(p))
        for p in (path, f"{path}-tuned")
    ]
    questions = read_questions()[: 2 * count : 2]
    return compare_models(pair[0], pair[1], SENTENCES[:count], questions, StopSignal(ranks), 0)


def stopped(sharded: bool) -> str:
    """What a signal in the middle of generation does, received by the last rank only."""
    model, finish = load_causal_lm(str(folder / "tied"), torch.float32, sharded, ranks)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))

    def generate(share: list, advance: object) -> list:
        tokens: list[int] = []

        def finished(number: int) -> None:
            tokens.append(number)
            if ranks.rank == ranks.world_size - 1 and len(tokens) == 4:  # a prompt and three tokens: the first answer
                os.kill(os.getpid(), signal.SIGTERM)

        return greedy_answers(model, share, set(), 3, 1, finished)

    try:
        prompts = [ids for ids, _ in SEQUENCES] * 2
        compute_over_ranks(generate, prompts, [len(ids) + 3 for ids in prompts], ranks, "answers", finish)
    except KeyboardInterrupt:
        return f"stopped after {len(forwards)} forwards"
    return "not stopped"


def stopped_forgetting() -> str:
    stop = StopSignal(ranks)
    stop.name = "SIGTERM" if ranks.rank == ranks.world_size - 1 else None
    model = load_packed(read_model_config(str(folder / "tied")), str(folder / "tied"), torch.float32, True, ranks)
    one = ModelAndTokenizer(model, load_tokenizer(str(folder / "tied")))
    try:
        compare_models(one, one, SENTENCES, read_questions(), stop, 0)
    except KeyboardInterrupt:
        return "stopped"
    return "not stopped"


def missing_on_last_rank(sharded: bool) -> str:
    name = "broken" if ranks.rank == ranks.world_size - 1 else "tied"
    try:
        load_causal_lm(str(folder / name), torch.float32, sharded, ranks)
    except UserError as error:
        return str(error)
    return "loaded"


results = {}
several = ranks.world_size > 1
for sharded in {False, several}:
    kind = "sharded" if sharded else "whole"
    for name in ("tied", "untied"):
        results[f"{name} {kind}"] = evaluate(name, sharded, torch.float32, 5)
    results[f"tied bf16 {kind}"] = evaluate("tied", sharded, torch.bfloat16, 2)
    results[f"few {kind}"] = evaluate("tied", sharded, torch.float32, 2)
    results[f"forgetting {kind}"] = compare(sharded, 4)
if several:
    results["one sharded"] = evaluate("tied", True, torch.float32, 1)
    results["forgetting one sharded"] = compare(True, 1)
    load_over_ranks.choose_dtype = lambda name, device: torch.float32 if ranks.rank == 1 else torch.bfloat16
    results["agreed dtype"] = str(agreed_dtype("auto", ranks))
    results["missing"] = [missing_on_last_rank(sharded) for sharded in (True, False)]
    results["stopped"] = [stopped(sharded=True), stopped_forgetting()]
(folder / f"{ranks.world_size}.{ranks.rank}.json").write_text(json.dumps(results))
dist.destroy_process_group()
exit_process(0)
