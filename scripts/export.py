"""Export a checkpoint of a run, a model directory or an adapter as a Hugging Face directory with a model card.

    python scripts/export.py runs/xbrl --best --dtype bf16 --out release/xbrl
    python scripts/export.py runs/xbrl --average-with-base 0.5 --out release/averaged
    python scripts/export.py MODEL --base BASE --average-with-base 0.5 --out release/averaged
    python scripts/export.py runs/xbrl_lora --merge-lora --out release/merged

One process; the weights are read and written file by file. --average-with-base A writes (1 - A) x base + A x tuned
(WiSE-FT, arXiv:2109.01903), which forgets less. The directory is complete or absent. Once it has been evaluated, the same
command adds the results to its card.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from common.lean_imports import begin_imports, end_imports

begin_imports()
import argparse
from pathlib import Path

import torch

from common.errors import UserError, run_script
from distributed.process_group import process_group, world_size_from_environment
from training.export.base_model import read_base_model
from training.export.card import CardInputs, Statements, model_card
from training.export.results import read_results
from training.export.subject import Choice, Subject, read_subject
from training.export.verify import verify_adapter, verify_model
from training.export.write import (
    DTYPES,
    Request,
    base_of,
    base_warning,
    check_out,
    final_weights,
    find_export,
    record_of,
    renew_card,
    write_export,
)

end_imports()


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the directory of a run, of a model, or of an adapter of peft"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the one that the run exports)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the lowest validation loss")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="of the files; auto: as in the base's config.json"
    )
    parser.add_argument("--base", type=Path, help="the base model, if it is not where the run found it")
    parser.add_argument(
        "--average-with-base", type=float, metavar="A", help="(1 - A) x base + A x tuned, in fp32; A from 0 to 1"
    )
    parser.add_argument(
        "--merge-lora", action="store_true", help="add the adapters to the weights (default: export them for peft)"
    )
    parser.add_argument("--out", type=Path, help="the directory (default: RUN/export-..., named after the options)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="load it in transformers; compare names and shapes with vLLM's and llama.cpp's",
    )
    parser.add_argument(
        "--converter", type=Path, help="with --verify, run this convert_hf_to_gguf.py of llama.cpp as well"
    )
    card = parser.add_argument_group(
        "the model card", "results in RUN/eval/*.json are used if they are of these weights"
    )
    card.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="JSON", help="further results of these weights"
    )
    card.add_argument("--name", help="of the model (default: the name of the directory)")
    card.add_argument("--license", help="the hub's name of the licence, in place of the base model's")
    card.add_argument("--language", nargs="+", default=[], metavar="CODE", help="of the training data: en, de, ...")
    card.add_argument("--dataset", nargs="+", default=[], metavar="ID", help="ids of the training data on the hub")
    card.add_argument("--author", help="who made the model")
    return parser.parse_args()


def default_out(subject: Subject, record: dict) -> Path:
    """RUN/export-step-000120-bfloat16 and the like. Raises UserError if the subject is no run."""
    if subject.run is None:
        raise UserError("name the directory to write with --out")
    parts = ["export", *([f"step-{record['step']:06d}"] if record.get("step") else []), record["dtype"]]
    parts += [record["kind"]] * (record["kind"] != "model")
    if record["averaged"]:
        parts.append(f"average-{record['averaged']['share_of_tuned']:g}")
    return subject.run.directory / "-".join(parts)


def main() -> int:
    """Export, unless it has been done; the card is renewed in any case. Returns 1 if a check of --verify fails."""
    arguments = parse_arguments()
    if world_size_from_environment()[0] > 1:
        raise UserError("an export is one process; start it as python scripts/export.py, without torchrun")
    request = Request(arguments.dtype, arguments.average_with_base)
    choice = Choice(arguments.step, arguments.best, arguments.base, arguments.merge_lora)
    with process_group(device=torch.device("cpu")) as ranks:
        subject = read_subject(arguments.run, choice, ranks)
        weights = final_weights(subject, request)
        record = record_of(subject, request)
        out = arguments.out or default_out(subject, record)
        check_out(out, subject.run.directory if subject.run else None)
        exists = find_export(out, record)
        base = read_base_model(subject.base)
        results = read_results(subject.run.directory if subject.run else None, arguments.results, record, out)
        stated = Statements(
            arguments.name or out.absolute().name,
            arguments.license,
            tuple(arguments.language),
            tuple(arguments.dataset),
            arguments.author,
        )
        card = model_card(CardInputs(out, subject, record, base, results, stated))
        if exists:
            renewed = renew_card(out, card)
            print(f"{out} already holds {subject.words}; its card {'was renewed' if renewed else 'is up to date'}")
        else:
            size = write_export(out, subject, weights, record, base, card)
            share = request.average_with_base
            averaged = f", {share:g} x tuned + {1 - share:g} x base" if share is not None else ""
            print(f"{subject.words}{averaged} -> {out}: {size / 2**20:,.0f} MiB in {record['dtype']}")
        if warning := base_warning(subject, record):
            print(warning)
    for why in results.left_out:
        print(f"not in the card: {why}")
    if not arguments.verify:
        return 0
    if record["kind"] == "adapter":
        good, lines = verify_adapter(out, base_of(subject))
    else:
        good, lines = verify_model(out, arguments.converter)
    print(*lines, sep="\n")
    return 0 if good else 1


if __name__ == "__main__":
    run_script(main)
