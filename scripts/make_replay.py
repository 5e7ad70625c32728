"""Make general text to mix into training on a domain (replay), so that the model does not forget it.

    python scripts/make_replay.py --source topics --out artifacts/replay/topics.jsonl
    torchrun --nproc_per_node=8 scripts/make_replay.py --source model --model artifacts/models/NAME --documents 20000 \\
        --out artifacts/replay/NAME.jsonl
    torchrun --nproc_per_node=8 train.py configs/xbrl.py "data.mix=replay:0.05:artifacts/replay/topics.jsonl"

`topics`: the language reference that comes with Python, without the part that evaluation holds out. `model`: text that
the model writes itself, for when its training data is not available (self-synthesized rehearsal: Huang et al.,
arXiv:2403.01244). A model with a chat template is given the start of a user turn; it writes a question and then the
answer (Xu et al., arXiv:2406.08464). Any other model writes documents after BOS or EOS.

Documents that are too short, repeat themselves, resemble an earlier one or overlap with evaluation texts are dropped
and counted. Each document is sampled with (--seed, its index), in batches that do not depend on the number of
processes, so on identical hardware any number of processes writes the same file. If it is interrupted, run the same
command again: it resumes after the finished batches. OUT appears only when it is complete.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import dataclasses
from pathlib import Path

import torch.distributed as dist

from common.dtypes import add_dtype_option
from common.durable_files import write_json_lines
from common.errors import UserError, run_script
from data.formats import example_text
from data.replay_filters import EvaluationTexts, Filters, filter_sampled
from distributed.process_group import read_on_first, start_process_group
from eval.general_text import SOURCE
from eval.load_over_ranks import add_sharding_option
from eval.over_ranks import TIMEOUT_MINUTES, on_every_rank
from eval.results import prepare_output
from eval.sample_replay import ReplaySampler, SamplingOptions, texts_to_exclude, topic_texts


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("topics", "model"), required=True, help="where the text comes from")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument(
        "--exclude", nargs="+", type=Path, default=[], metavar="FILE", help="more texts that evaluation uses"
    )
    parser.add_argument("--model", help="the base model: a Hugging Face directory")
    parser.add_argument(
        "--documents", type=int, default=1000, help="documents to sample before filtering (%(default)s)"
    )
    parser.add_argument(
        "--form", choices=("auto", "text", "chat"), default="auto", help="auto: chat if the model has a chat template"
    )
    parser.add_argument(
        "--start", help="the text that a document is sampled after, e.g. '<|endoftext|>' (default: BOS, else EOS)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="maximum length of a text, a question or an answer (%(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="1 is the model's own distribution (%(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="documents generated at once (%(default)s)")
    add_dtype_option(parser)
    add_sharding_option(parser)
    defaults = Filters()
    parser.add_argument(
        "--min-characters", type=int, default=defaults.min_characters, help="drop shorter documents (%(default)s)"
    )
    parser.add_argument(
        "--max-repeated",
        type=float,
        default=defaults.max_repetition,
        help="drop documents with a larger share of repeated text (%(default)s)",
    )
    parser.add_argument(
        "--max-alike",
        type=float,
        default=defaults.max_similarity,
        help="drop documents with a larger Jaccard similarity to an earlier one (%(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists; remove it or choose another --out")
    prepare_output(arguments.out)
    if arguments.source == "model" and not arguments.model:
        raise UserError("--source model needs a --model")
    return arguments


def main() -> int:
    """Write the file and print the counts."""
    arguments = parse_arguments()
    options = SamplingOptions(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(SamplingOptions)}
    )
    options.check()
    if arguments.source == "topics":
        write_topics(arguments.out, texts_to_exclude(arguments.exclude))
        return 0
    ranks = start_process_group(TIMEOUT_MINUTES)
    sampler = read_on_first(lambda: ReplaySampler(options, arguments.out), ranks)
    # Only rank 0 filters. The files are read now, so that a mistake in them is reported before the work.
    evaluation = on_every_rank(lambda: texts_to_exclude(arguments.exclude) if ranks.rank == 0 else None, ranks)
    documents = sampler.sample(ranks, arguments.sharding)
    if documents is not None and evaluation is not None:  # on rank 0
        filters = Filters(arguments.min_characters, arguments.max_repeated, arguments.max_alike)
        write_filtered(arguments.out, documents, filters, evaluation)
        sampler.remove_parts()
    dist.destroy_process_group()
    return 0


def write_topics(out: Path, evaluation: EvaluationTexts) -> None:
    """Write the topics that are not held out, and print the counts."""
    texts, num_dropped = topic_texts(evaluation)
    write_json_lines(out, [{"text": text} for text in texts])
    print(
        f"{out}: {len(texts)} documents, {sum(map(len, texts)):,} characters, {SOURCE}; dropped: {num_dropped} "
        "paragraphs that overlap with evaluation"
    )


def write_filtered(out: Path, sampled: list[dict], filters: Filters, evaluation: EvaluationTexts) -> None:
    """Write the sampled documents that pass the filters, and print the counts. Raises UserError if there are none."""
    filtered = filter_sampled(sampled, filters, evaluation)
    write_json_lines(out, filtered.documents)
    characters = sum(len(example_text(document)) for document in filtered.documents)
    dropped = ", ".join(f"{count} {reason}" for reason, count in filtered.dropped.items() if count) or "none"
    print(
        f"{out}: {len(filtered.documents)} of {len(sampled)} documents, {characters:,} characters; dropped: {dropped}"
    )
    if filtered.num_truncated:
        print(f"{filtered.num_truncated} texts reached --max-tokens and end with their last complete sentence")


if __name__ == "__main__":
    run_script(main)
