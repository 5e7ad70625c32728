"""Speed of our greedy answers beside transformers' own, on the same prompts: python -m bench.generation MODEL --data FILE

    python -m bench.generation artifacts/models/SmolLM2-135M-Instruct --data artifacts/quickstart/test.jsonl \\
        --train artifacts/quickstart/train.jsonl --dtype bf16 --json generation.json

Arms: `ours` (eval/generate.py); `static`, transformers' `generate` on batches of prompts of similar length; `continuous`, its
`generate_batch`. They run in turn, each round all of them, in one process, on models loaded alike. All answers are compared
with ours token by token. In fp32 they are the same up to ties; in bf16 every arm rounds in its own way.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from bench.tokenization import Times
from common.dtypes import add_dtype_option, choose_dtype, dtype_name
from common.durable_files import write_json
from common.errors import UserError, run_script
from distributed.device import choose_device
from eval.generate import greedy_answers, load_for_generation, stop_tokens
from eval.inputs import EvaluationOptions, read_inputs
from eval.row_cache import left_padded

Answers = list[list[int]]
Answer = Callable[[list[list[int]]], Answers]
ARMS = ("ours", "static", "continuous")
CACHE_SHARE = 0.25  # of the free memory, for the cache of `generate_batch`; its default takes 0.6 of a CPU's


def static_answers(model: PreTrainedModel, settings: GenerationConfig, rows: int, prompts: list[list[int]]) -> Answers:
    """`generate` on batches of `rows` prompts, padded on the left; the longest prompts first, as ours."""
    answers: Answers = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        ids, mask, _ = left_padded([prompts[i] for i in chosen], model.device)
        output = model.generate(ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :]
        for i, tokens in zip(chosen, output.tolist(), strict=True):
            answers[i] = until_stop(tokens, settings.eos_token_id)
    return answers


def continuous_answers(model: PreTrainedModel, settings: GenerationConfig, prompts: list[list[int]]) -> Answers:
    """`generate_batch`. Raises UserError if it gives up."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig  # not in 5.17

    config = ContinuousBatchingConfig(max_memory_percent=CACHE_SHARE)
    found = model.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=config)
    if len(found) < len(prompts):
        raise UserError(f"generate_batch answered {len(found)} of {len(prompts)} prompts")
    return [until_stop(one.generated_tokens, settings.eos_token_id) for one in found.values()]


def until_stop(tokens: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The tokens before the first stop token."""
    return list(tokens[: next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))])


def agreement(answers: Answers, expected: Answers) -> tuple[int, float]:
    """(answers that are the same, share of the expected tokens before the first difference of each)."""
    same = sum(one == other for one, other in zip(answers, expected, strict=True))
    common = 0
    for one, other in zip(answers, expected, strict=True):
        pairs = enumerate(zip(one, other, strict=False))
        common += next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    return same, common / max(1, sum(map(len, expected)))


def make_arms(arguments: argparse.Namespace, stop_ids: set[int], new_tokens: int) -> dict[str, Answer]:
    """Arm -> what answers prompts."""
    dtype, device = choose_dtype(arguments.dtype, torch.device(arguments.device)), torch.device(arguments.device)
    ours = load_for_generation(arguments.model, dtype, device)
    plain = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=sorted(stop_ids), pad_token_id=min(stop_ids)
    )
    plain.generation_config = settings
    rows = arguments.batch_size
    arms = {
        "ours": lambda prompts: greedy_answers(ours, prompts, stop_ids, new_tokens, rows),
        "static": functools.partial(static_answers, plain, settings, rows),
        "continuous": functools.partial(continuous_answers, plain, settings),
    }
    chosen = arguments.arms.split(",")
    if unknown := [name for name in chosen if name not in arms]:
        raise UserError(f"--arms: {unknown[0]!r} is unknown; choose from {', '.join(arms)}")
    return {name: arms[name] for name in arms if name in chosen}


def measure(arms: dict[str, Answer], prompts: list[list[int]], rounds: int) -> tuple[dict[str, list[Times]], dict]:
    """(arm -> times of each round, arm -> its answers). An arm that fails is named, with the reason as its answers."""
    times: dict[str, list[Times]] = {name: [] for name in arms}
    answers: dict[str, Answers | str] = {}
    for name, answer in arms.items():
        try:
            answer(prompts[:2])  # whatever happens only once
        except Exception as error:  # noqa: BLE001  whatever a peer raises is a line in the table
            answers[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for _ in range(rounds):
        for name, answer in arms.items():
            if isinstance(answers.get(name), str):
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            answers[name] = answer(prompts)
            times[name].append(Times(time.perf_counter() - wall, time.process_time() - cpu))
    return times, {name: answers[name] for name in arms}


def table(times: dict[str, list[Times]], answers: dict) -> list[str]:
    """One line per arm, compared with the first: tokens are those of the answers; the spread is over the rounds.

    On a machine that is busy all the time, compare the CPU times. On a GPU they say little.
    """
    first = next(iter(answers))
    lines = [
        f"{'':12}{'seconds':>9}{'spread':>8}{'CPU s':>8}{'tokens':>8}{'tokens/s':>10}{first + ' is':>10}{'in CPU s':>10}"
        "  the same answers"
    ]
    wall, cpu = (
        {name: statistics.median(getattr(one, field) for one in some) for name, some in times.items() if some}
        for field in ("seconds", "cpu_seconds")
    )
    for name, found in answers.items():
        if isinstance(found, str):
            lines.append(f"{name:12}{found}")
            continue
        tokens = sum(map(len, found))
        spread = (max(one.seconds for one in times[name]) - min(one.seconds for one in times[name])) / wall[name]
        same, share = agreement(found, answers[first])
        lines.append(
            f"{name:12}{wall[name]:>9.1f}{spread:>8.1%}{cpu[name]:>8.1f}{tokens:>8}{tokens / wall[name]:>10.0f}"
            f"{wall[name] / wall[first]:>9.2f}x{cpu[name] / cpu[first]:>9.2f}x  "
            f"{same} of {len(found)}; {share:.1%} of the tokens before the first difference"
        )
    return lines


def main() -> None:
    """Read the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True, help="as in scripts/evaluate.py, like the next five")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=EvaluationOptions.batch_size)
    parser.add_argument("--max-new-tokens", type=int)
    add_dtype_option(parser)
    parser.add_argument("--arms", default=",".join(ARMS), help="some of them, separated by commas (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU; default: all cores")
    parser.add_argument("--json", type=Path, help="write times and answers to this file")
    arguments = parser.parse_args()
    arguments.device = str(choose_device(0, 1))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    names = ("model", "data", "train", "shots", "limit", "batch_size", "max_new_tokens", "dtype")
    inputs = read_inputs(EvaluationOptions(**{name: getattr(arguments, name) for name in names}))
    model = load_for_generation(arguments.model, torch.float32, torch.device("cpu"))
    arms = make_arms(arguments, stop_tokens(model, inputs.stop_ids), inputs.max_new_tokens)
    del model
    dtype = dtype_name(choose_dtype(arguments.dtype, torch.device(arguments.device)))
    print(
        f"{len(inputs.prompts)} prompts of {sum(map(len, inputs.prompts))} tokens, at most {inputs.max_new_tokens} new ones; "
        f"{dtype}, {arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )
    times, answers = measure(arms, inputs.prompts, arguments.rounds)
    print("\n".join(table(times, answers)))
    if arguments.json:
        write_json(
            arguments.json, {"times": {name: [*map(asdict, some)] for name, some in times.items()}, "answers": answers}
        )


if __name__ == "__main__":
    run_script(main)
