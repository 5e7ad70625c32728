"""Make general text to mix in while a domain is learned (replay), so that the model does not forget it.

    python scripts/make_replay.py --source topics --out artifacts/replay/topics.jsonl
    torchrun --nproc_per_node=8 scripts/make_replay.py --source model --model artifacts/models/NAME --documents 20000 \\
        --out artifacts/replay/NAME.jsonl
    torchrun --nproc_per_node=8 train.py configs/xbrl.py "data.mix=replay:0.05:artifacts/replay/topics.jsonl"

`topics`: the language reference that comes with Python, without the part that evaluation holds out. `model`: for those who
do not have what the model was trained on, it writes it itself (self-synthesised rehearsal: Huang et al., arXiv:2403.01244).
A model with a chat template is given the beginning of a user's turn, writes the question, then the answer (Xu et al.,
arXiv:2406.08464); another one writes documents from BOS or EOS on.

Documents that are too short, go in circles, resemble one before them or overlap with what evaluation uses are left out and
counted. Each is drawn by (--seed, its number), in batches that do not depend on the number of processes, so that on like
machines any number of them writes the same file. Killed, the same command goes on behind the batches that are done; OUT
appears only when all of it is there.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError, run_script
from data.files import read_file
from data.replay_filters import Evaluated, Filters, ended, filtered, normalised
from data.tokens import PLAIN_CHAT_TEMPLATE, encode_prompt, load_tokenizer
from distributed.process_group import barrier, start_process_group
from eval import general_text
from eval.generate import Sampling, sampled_answers
from eval.questions import read_questions
from eval.results import prepare_output
from scripts.evaluate import load_model

MARK = "here the user's words begin"


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("topics", "model"), required=True, help="where the text comes from")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to make")
    parser.add_argument(
        "--exclude", nargs="+", type=Path, default=[], metavar="FILE", help="more texts that evaluation uses"
    )
    parser.add_argument("--model", help="the base model: a Hugging Face directory")
    parser.add_argument("--documents", type=int, default=1000, help="to sample, before filters (%(default)s)")
    parser.add_argument(
        "--form", choices=("auto", "text", "chat"), default="auto", help="auto: chat if the model has a template"
    )
    parser.add_argument("--start", help="what a text begins behind, e.g. '<|endoftext|>' (default: BOS, else EOS)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a text, a question, an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="1: the model's own distribution (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="of this much of it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="documents written at once (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the hardware has it"
    )
    defaults = Filters()
    parser.add_argument(
        "--min-characters", type=int, default=defaults.min_characters, help="of a document (%(default)s)"
    )
    parser.add_argument(
        "--max-repeated", type=float, default=defaults.repeated, help="share that stood before in it (%(default)s)"
    )
    parser.add_argument(
        "--max-alike", type=float, default=defaults.alike, help="Jaccard similarity with another (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists; remove it or choose another --out")
    prepare_output(arguments.out)
    if arguments.source == "model" and not arguments.model:
        raise UserError("--source model needs a --model")
    for name in ("documents", "max_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(arguments, name)}")
    if not arguments.temperature > 0:
        raise UserError(f"--temperature must be above 0, not {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p lies above 0 and at most at 1, not {arguments.top_p}")
    if arguments.source == "model" and not Path(arguments.model, "config.json").is_file():
        raise UserError(f"{arguments.model} is not a model directory (no config.json): see scripts/fetch_base_model.py")
    return arguments


def main() -> int:
    """Write the file."""
    arguments = parse_arguments()
    evaluated = Evaluated(evaluated_texts(arguments.exclude))
    if arguments.source == "topics":
        texts, left_out = topics(evaluated)
        write(arguments.out, [{"text": text} for text in texts])
        print(
            f"{arguments.out}: {len(texts)} documents, {sum(map(len, texts)):,} characters, {general_text.SOURCE}; left out: "
            f"{left_out} paragraphs that overlap with evaluation"
        )
        return 0
    tokenizer = load_tokenizer(arguments.model)
    settings = sampling_settings(arguments, tokenizer)
    parts = arguments.out.with_name(arguments.out.name + ".parts")
    check_settings(parts, settings)

    ranks = start_process_group(timeout_minutes=24 * 60)  # ranks finish their shares at different times
    model, _ = load_model(arguments.model, arguments.dtype, ranks.device)
    if ranks.rank == 0:
        parts.mkdir(parents=True, exist_ok=True)
        write(parts / "settings.json", [settings])
    barrier(ranks)
    starts = range(0, arguments.documents, arguments.batch_size)
    files = [parts / f"{start:09}.jsonl" for start in starts]
    mine = range(ranks.rank, len(starts), ranks.world_size)
    what = "batches" if ranks.world_size == 1 else f"batches (rank 0 of {ranks.world_size})"
    for batch in tqdm(mine, desc=what, unit="batch", disable=ranks.rank != 0, mininterval=1):
        if not files[batch].exists():
            numbers = range(starts[batch], min(arguments.documents, starts[batch] + arguments.batch_size))
            write(files[batch], sample(model, tokenizer, list(numbers), settings))
    barrier(ranks)
    if ranks.rank == 0:
        documents = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        filters = Filters(arguments.min_characters, arguments.max_repeated, arguments.max_alike)
        print(write_filtered(arguments.out, documents, filters, evaluated))
        shutil.rmtree(parts)
    dist.destroy_process_group()
    return 0


def evaluated_texts(exclude: list[Path]) -> Iterator[str]:
    """All that a replayed document may not overlap with: held-out text, questions with their answers, and the user's files."""
    yield from general_text.held_out_texts()
    yield from (question.prompt + question.options[0] for question in read_questions())
    for path in exclude:
        for _, example in read_file(path):
            yield as_text(example)


def topics(evaluated: Evaluated) -> tuple[list[str], int]:
    """The topics that are not held out, and how many of their paragraphs were left out for an overlap."""
    kept, left_out = [], 0
    for text in general_text.training_texts():
        paragraphs = text.split("\n\n")
        fresh = [paragraph for paragraph in paragraphs if not evaluated.overlaps(normalised(paragraph))]
        left_out += len(paragraphs) - len(fresh)
        kept += ["\n\n".join(fresh)] if fresh else []
    return kept, left_out


def sampling_settings(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What decides each document: it is kept beside the parts, and a run that goes on must have the same."""
    chat = arguments.form == "chat" or (
        arguments.form == "auto" and tokenizer.chat_template != PLAIN_CHAT_TEMPLATE and arguments.start is None
    )
    if chat:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
        start = tokenizer.encode(rendered[: rendered.index(MARK)], add_special_tokens=False)
    elif arguments.start is not None:
        start = tokenizer.encode(arguments.start, add_special_tokens=False)
    else:
        start = tokenizer.encode("") or [tokenizer.eos_token_id]
    if not start:
        raise UserError(f"--start {arguments.start!r} is no token; name one, e.g. {tokenizer.eos_token!r}")
    names = ("model", "documents", "max_tokens", "temperature", "top_p", "seed", "batch_size", "dtype")
    return {"form": "chat" if chat else "text", "start": start} | {name: getattr(arguments, name) for name in names}


def check_settings(parts: Path, settings: dict) -> None:
    """Raises UserError if what an interrupted run left was made with others."""
    path = parts / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, value in settings.items() if before.get(name) != value]
        if other:
            raise UserError(f"{parts} was made with another {', '.join(other)}; use the same, or remove it")


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, numbers: list[int], settings: dict
) -> list[dict]:
    """One batch of documents, filters not yet applied. `finished`: it ended by itself."""
    sampling = Sampling(settings["temperature"], settings["top_p"], settings["seed"])
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    stop_ids = special | {tokenizer.eos_token_id}

    def answers(prompts: list[list[int]], draws: list[int]) -> list[tuple[str, bool]]:
        if not prompts:
            return []
        ids = sampled_answers(model, prompts, draws, stop_ids, settings["max_tokens"], sampling)
        return [(tokenizer.decode(one).strip(), len(one) < settings["max_tokens"]) for one in ids]

    begun = answers([settings["start"]] * len(numbers), [2 * number for number in numbers])
    if settings["form"] == "text":
        return [{"text": text, "finished": finished} for text, finished in begun]
    users = [{"role": "user", "content": text} for text, _ in begun]
    asked = [i for i, (text, finished) in enumerate(begun) if text and finished]
    prompts = [encode_prompt(tokenizer, [users[i]]) for i in asked]
    replies = dict(zip(asked, answers(prompts, [2 * numbers[i] + 1 for i in asked]), strict=True))
    documents = []
    for i, user in enumerate(users):
        text, finished = replies.get(i, ("", False))
        documents.append({"messages": [user, {"role": "assistant", "content": text}], "finished": finished})
    return documents


def write_filtered(out: Path, documents: list[dict], filters: Filters, evaluated: Evaluated) -> str:
    """Write what passes the filters, in order; a sentence with the counts. Raises UserError where nothing does."""
    usable, unfinished, cut = [], 0, 0
    for document in documents:
        if not document.pop("finished"):
            if "messages" in document:
                unfinished += 1
                continue
            document["text"] = ended(document["text"])
            cut += 1
        usable.append(document)
    kept, left_out = filtered([as_text(document) for document in usable], filters, evaluated)
    if not kept:
        raise UserError(f"no document of {len(documents)} passed the filters: {unfinished} unfinished, {left_out}")
    write(out, [usable[i] for i in kept])
    reasons = ({"unfinished": unfinished} if unfinished else {}) | {k: v for k, v in left_out.items() if v}
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    characters = sum(len(as_text(usable[i])) for i in kept)
    return f"{out}: {len(kept)} of {len(documents)} documents, {characters:,} characters; left out: {told}" + (
        f"; {cut} were cut at --max-tokens and end with their last whole sentence" if cut else ""
    )


def as_text(document: dict) -> str:
    """A document, or all that is said in a chat."""
    if "text" in document:
        return document["text"]
    return "\n\n".join(message["content"] for message in document["messages"])


def write(path: Path, lines: list[dict]) -> None:
    """JSON lines, written aside and renamed, so that what stands there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    os.replace(aside, path)


if __name__ == "__main__":
    run_script(main)
