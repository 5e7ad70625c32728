"""Evaluate a model directory on examples: violations F1, ROUGE-L of the directive, loss on response tokens.

    python scripts/evaluate.py artifacts/models/SmolLM2-135M-Instruct --data artifacts/laptop/validation.jsonl
    torchrun --nproc_per_node=2 scripts/evaluate.py runs/laptop/export --data FILE --train FILE --general --json after.json

Every process holds the whole model and answers its share of the examples (greedy). bf16 where the hardware has it, else
fp32. With --before FILE (the JSON of an earlier evaluation of the same data) a table before | after is printed too, with 95%
intervals of the change (a bootstrap over examples, paired).
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import hashlib
import math
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.dtypes import has_native_bf16
from common.errors import UserError, run_script
from data.examples import read_examples
from data.tokens import encode_example, encode_prompt, load_tokenizer
from distributed.process_group import Ranks, start_process_group
from eval import general_text
from eval.generate import greedy_answers
from eval.perplexity import target_losses, total, windows
from eval.regulator import report
from eval.regulator.score import score_answers
from eval.report import check_comparable
from eval.results import prepare_output, read_result, write_result

GENERAL_WINDOW = 1024  # tokens of context at most when the perplexity of general text is measured


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face directory (config, safetensors, tokenizer)")
    parser.add_argument("--data", required=True, type=Path, help="examples to answer, JSONL with `messages`")
    parser.add_argument("--train", type=Path, help="the training split: what the trivial baselines are fitted on")
    parser.add_argument("--limit", type=int, help="a fixed random choice of this many examples (default: all)")
    parser.add_argument("--batch-size", type=int, default=32, help="answers written at once (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="default: 16 more than the longest answer in --data")
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="what the model computes in (%(default)s)"
    )
    parser.add_argument("--general", action="store_true", help="perplexity on general text that training never sees")
    parser.add_argument("--json", type=Path, help="write all figures and answers here")
    parser.add_argument("--before", type=Path, help="the JSON of an earlier evaluation, to compare with")
    parser.add_argument("--show", type=int, default=1, help="how many of the answers to print (%(default)s)")
    arguments = parser.parse_args()
    for name in ("limit", "batch_size", "max_new_tokens"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(arguments, name)}.")
    return arguments


def main() -> int:
    """Evaluate, print the tables on rank 0, write the JSON."""
    arguments = parse_arguments()
    start = time.perf_counter()
    # All that reads files comes before a process group starts, so that a mistake is one sentence.
    examples = choose(read_examples(arguments.data), arguments.limit)
    training = read_examples(arguments.train) if arguments.train else None
    before = read_result(arguments.before) if arguments.before else None
    if arguments.json:
        prepare_output(arguments.json)
    if not Path(arguments.model, "config.json").is_file():
        raise UserError(
            f"{arguments.model} is not a model directory (no config.json): see scripts/fetch_base_model.py."
        )
    tokenizer = load_tokenizer(arguments.model)
    positions = getattr(AutoConfig.from_pretrained(arguments.model), "max_position_embeddings", None) or math.inf
    sequences = [encode_example(tokenizer, example) for example in examples]
    asked = [i for i, e in enumerate(examples) if "messages" in e and e["messages"][-1]["role"] == "assistant"]
    prompts = [encode_prompt(tokenizer, examples[i]["messages"]) for i in asked]
    max_new_tokens = arguments.max_new_tokens or 16 + max(
        (len(sequences[i][0]) - len(prompt) for i, prompt in zip(asked, prompts, strict=True)), default=0
    )
    longest = max([len(ids) for ids, _ in sequences] + [len(prompt) + max_new_tokens for prompt in prompts])
    if longest > positions:
        raise UserError(
            f"{arguments.data}: the longest example needs {longest} positions with --max-new-tokens {max_new_tokens}, "
            f"{arguments.model} has {positions}: shorten it, or ask for fewer tokens."
        )
    result = {
        "model": arguments.model,
        "data": str(arguments.data),
        "data_sha256": hashlib.sha256(arguments.data.read_bytes()).hexdigest(),
        "n_examples": len(examples),
        "general_source": general_text.SOURCE if arguments.general else None,
        "max_new_tokens": max_new_tokens,
    }
    if before is not None:
        check_comparable(before, result)

    ranks = start_process_group(timeout_minutes=24 * 60)  # ranks finish their shares at different times
    model, dtype = load_model(arguments.model, arguments.dtype, ranks.device)
    losses = over_ranks(
        lambda share, advance: target_losses(model, share, advance), sequences, ranks, "loss of the responses"
    )
    stop_ids = stop_tokens(model, tokenizer.eos_token_id)
    answers = over_ranks(
        lambda share, advance: greedy_answers(model, share, stop_ids, max_new_tokens, arguments.batch_size, advance),
        prompts,
        ranks,
        "answers",
    )
    loss = total(losses)
    result |= {
        "dtype": dtype,
        "processes": ranks.world_size,
        "cut_short": sum(len(answer) == max_new_tokens for answer in answers),
        "loss": {"mean": loss.mean, "targets": loss.targets},
        "losses": [(one.nats, one.targets) for one in losses],  # by example, for intervals
    }
    if asked:
        texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        where, train_where = str(arguments.data), str(arguments.train)
        result |= score_answers([examples[i] for i in asked], texts, where, training, train_where)
    if arguments.general:
        result["general"] = general_perplexity(model, tokenizer, min(GENERAL_WINDOW, positions), ranks)
    result["seconds"] = round(time.perf_counter() - start, 1)
    if ranks.rank == 0:
        if arguments.json:
            write_result(arguments.json, result)
        print_result(result, before, arguments.show)
    dist.destroy_process_group()
    return 0


def choose(examples: list[dict], limit: int | None) -> list[dict]:
    """At most `limit` examples, chosen at random but always the same, in file order (a file may be sorted by bank)."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), limit))]


def load_model(path: str, dtype_name: str, device: torch.device) -> tuple[PreTrainedModel, str]:
    """The model for inference on `device`, and the dtype it computes in; "auto" is bf16 where the hardware has it, else fp32."""
    transformers_logging.disable_progress_bar()
    bf16 = dtype_name == "bf16" or (dtype_name == "auto" and has_native_bf16(device))
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded as a causal language model: {str(error).splitlines()[0]}") from error
    return model.to(device).eval(), str(dtype).removeprefix("torch.")


def stop_tokens(model: PreTrainedModel, eos_token_id: int) -> set[int]:
    """What ends an answer: the tokenizer's EOS, which training teaches, and those the model came with."""
    stops = model.generation_config.eos_token_id
    return {eos_token_id, *(stops if isinstance(stops, list) else [] if stops is None else [stops])}


def over_ranks(compute, items: list, ranks: Ranks, what: str) -> list:  # noqa: ANN001 (a function of (items, advance))
    """`compute(share, advance)` on each rank's share of `items`; every rank gets all results, in the order of `items`."""
    # Dealt out in order of length, so that every rank gets as many long ones.
    order = sorted(range(len(items)), key=lambda i: (-_length(items[i]), i))
    mine = order[ranks.rank :: ranks.world_size]
    desc = what if ranks.world_size == 1 else f"{what} (rank 0 of {ranks.world_size})"
    with tqdm(total=len(mine), desc=desc, unit="example", disable=ranks.rank != 0) as bar:
        share = list(zip(mine, compute([items[i] for i in mine], bar.update), strict=True))
    gathered = [None] * ranks.world_size
    dist.all_gather_object(gathered, share, group=ranks.flags)
    return [result for _, result in sorted((pair for part in gathered for pair in part), key=lambda pair: pair[0])]


def _length(item: list | tuple) -> int:
    """Tokens of a prompt, or of a pair (token ids, is_target)."""
    return len(item[0]) if isinstance(item, tuple) else len(item)


def general_perplexity(model: PreTrainedModel, tokenizer, window: int, ranks: Ranks) -> dict:  # noqa: ANN001
    """Perplexity of eval/general_text.py's held-out texts, per token and (comparable between tokenizers) per byte."""
    texts = general_text.held_out_texts()
    tokenised = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    sequences = [sequence for ids in tokenised for sequence in windows(ids, window)]
    loss = total(
        over_ranks(lambda share, advance: target_losses(model, share, advance), sequences, ranks, "general text")
    )
    # The first token of a text is not predicted, so its bytes do not count.
    first = sum(len(tokenizer.decode(ids[:1]).encode()) for ids in tokenised)
    size = sum(len(text.encode()) for text in texts) - first
    return {
        "perplexity": math.exp(loss.mean),
        "perplexity_per_byte": math.exp(loss.nats / size),
        "tokens": loss.targets,
        "bytes": size,
        "source": general_text.SOURCE,
    }


def print_result(result: dict, before: dict | None, show: int) -> None:
    """The table, the comparison and some answers."""
    print(report.table(result))
    if before is not None:
        print(f"\n{report.compare(before, result)}")
    for index in range(min(show, len(result.get("answers", ())))):
        print(f"\n{report.one_answer(result, index)}")


if __name__ == "__main__":
    run_script(main)
