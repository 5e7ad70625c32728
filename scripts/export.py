"""Export a checkpoint of a run as a Hugging Face directory with a model card.

    python scripts/export.py runs/xbrl --best --dtype bf16 --out release/xbrl --verify
    python scripts/export.py runs/xbrl --average-with-base 0.5 --out release/averaged
    python scripts/export.py runs/xbrl_lora --merge-lora --out release/merged

One process; the weights are read and written file by file. --average-with-base A writes (1 - A) x base + A x tuned
(WiSE-FT, arXiv:2109.01903), which forgets less. The directory is complete or absent. Once it has been evaluated with its
JSON in RUN/eval, the same command adds the results to its card. --sign KEY signs the whole directory (docs/check.md), and
--push ORGANISATION/NAME uploads it to the Hugging Face hub, to a private repository unless --public is given.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])


import argparse
from pathlib import Path

import torch

from common.command_line import new_parser
from common.durable_files import write_durably
from common.errors import UserError, run_script
from distributed.process_group import process_group, world_size_from_environment
from model.dtypes import DTYPES
from model.hub import push
from scripts.export.bom import write_bom
from scripts.export.signature import sign_release
from training.checkpoint_export import damage_of, is_written, read_export, verify, write_export
from training.ending import BOM, SIGNATURE, check_recorded
from training.model_card import base_model, model_card, read_data_card, read_results


def parse_arguments() -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the one that the run exports)")
    which.add_argument("--best", action="store_true", help="the best checkpoint by run.best_by")
    dtypes = "of the files; auto: as in the base's config.json"
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help=dtypes)
    parser.add_argument("--base", type=Path, help="the base model, if it is not where the run found it")
    average = "(1 - A) x base + A x tuned, in fp32; A from 0 to 1"
    parser.add_argument("--average-with-base", type=float, metavar="A", help=average)
    merge = "add the adapters to the weights (default: export them for peft)"
    parser.add_argument("--merge-lora", action="store_true", help=merge)
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    proof = (
        "check the SHA-256 of its files, load it with transformers, and compare its logits with the trained weights'"
    )
    parser.add_argument("--verify", action="store_true", help=proof)
    release = parser.add_argument_group("a release", "its libraries are optional (requirements.txt says which)")
    bom = "write bom.json, a bill of materials of the model in CycloneDX 1.7"
    release.add_argument("--bom", action="store_true", help=bom)
    release.add_argument("--sign", type=Path, metavar="KEY", help="sign the directory by a private key; implies --bom")
    release.add_argument("--push", metavar="ORG/NAME", help="upload the directory to the Hugging Face hub (private)")
    release.add_argument("--public", action="store_true", help="a repository that --push creates is public")
    card = parser.add_argument_group(
        "the model card", "results in RUN/eval/*.json are used if they were measured on these weights"
    )
    card.add_argument("--name", help="of the model (default: the name of the directory)")
    card.add_argument("--license", help="the hub's name of the licence, in place of the base model's")
    return parser.parse_args()


def main() -> int:
    """Write the export, unless it exists already, and renew its model card.

    Return 1 if --verify finds other weights or a file is damaged; such an export is neither signed nor pushed.
    """
    arguments = parse_arguments()
    if world_size_from_environment()[0] > 1:
        raise UserError("an export is one process; start it as python scripts/export.py, without torchrun")
    out, good = arguments.out, True
    with process_group(device=torch.device("cpu")) as ranks:
        export = read_export(arguments.run, arguments, ranks)
        exists = is_written(out, export.contents)
        if exists:
            check_recorded(arguments.run, out)
        if (out / SIGNATURE).exists() and not arguments.sign:
            raise UserError(
                f"{out} is signed, and its card would change; name the key with --sign, or remove {SIGNATURE}"
            )
        results = read_results(out, export)
        card = model_card(out, export, results, arguments)
        weights = f"the {export.contents['weights']} weights of {arguments.run} (step {export.contents['step']})"
        if exists:
            write_durably(out / "README.md", card)
            print(f"{out} already holds {weights}; its card was renewed")
        else:
            profile = read_data_card(export.config).get("arguments", {}).get("profile")
            base_name = base_model(export.base)["hub_id"] or str(export.base)
            size = write_export(out, export, profile, base_name, card)
            kind = {"model": "", "merged": ", merged", "adapter": ", an adapter"}[export.contents["kind"]]
            share = (export.contents["averaged"] or {}).get("share_of_tuned")
            averaged = f", {share:g} x tuned + {1 - share:g} x base" if share is not None else ""
            print(f"{weights}{kind}{averaged} -> {out}: {size / 2**20:,.0f} MiB in {export.contents['dtype']}")
        if export.registered:
            kept = ", ".join(export.registered)
            print(f"warning: {out} has the trained weights alone; what the checkpoint also has ({kept}) is not in it")
        for sentence in results.left_out:
            print(f"not in the card: {sentence}")
        lines = damage_of(out, ranks) if arguments.verify or arguments.sign or arguments.push else []
        good = not lines
        if good and arguments.verify:
            print(
                "comparing with transformers; on a processor that cannot compute in the dtype of the export it takes minutes",
                flush=True,
            )
            good, lines = verify(out, export)
        if good and (arguments.bom or arguments.sign or (out / BOM).exists()):
            lines.append(write_bom(out, export, results, arguments))
        if good and arguments.sign:
            sign_release(out, arguments.sign)
            lines.append(f"signed: {out / SIGNATURE}")
        if good and arguments.push:
            lines.append(push(out, arguments.push, arguments.public))
        for line in lines:
            print(line)
    return 0 if good else 1


if __name__ == "__main__":
    run_script(main)
