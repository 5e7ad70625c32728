"""Export a checkpoint of a run as a Hugging Face directory with a model card.

    python scripts/export.py runs/mine --best --dtype bf16 --out release/mine --verify
    python scripts/export.py runs/mine --average-with-base 0.5 --out release/averaged
    python scripts/export.py runs/mine_lora --merge-lora --out release/merged
    python scripts/export.py runs/mine --dtype bf16 --out release/mine --gguf llama.cpp/convert_hf_to_gguf.py

One process; the weights are read and written file by file. --average-with-base A writes (1 - A) x base + A x tuned
(WiSE-FT, arXiv:2109.01903), which forgets less. The card has the results in RUN/eval that were measured on the same weights. To
add a result later, remove the directory and run the same command again. --sign KEY signs the whole directory (docs/check.md), and
--push ORGANISATION/NAME uploads it to a private repository of the Hugging Face hub. --gguf also writes release/mine-gguf with a file
for llama.cpp and a Modelfile for Ollama.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])


import argparse
from pathlib import Path

import torch

from common.command_line import check_new, new_parser
from common.durable_files import write_durably
from common.errors import UserError, run_script
from distributed.process_group import process_group, world_size_from_environment
from model.dtypes import DTYPES
from model.hub import push
from scripts.export.bom import write_bom
from scripts.export.gguf_file import LEAST_CONTEXT, gguf_directory, write_gguf
from scripts.export.signature import sign_release
from training.chat_settings import chat_settings
from training.checkpoint_export import read_export, verify, write_export
from training.ending import CARD, SIGNATURE
from training.model_card import base_model, model_card, read_results


def parse_arguments() -> argparse.Namespace:
    """Return the command line; see --help."""
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the one that the run exports)")
    which.add_argument("--best", action="store_true", help="the best checkpoint by run.best_by")
    dtypes = "of the files; auto: as in the base's config.json"
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help=dtypes)
    average = "(1 - A) x base + A x tuned, in fp32; A from 0 to 1"
    parser.add_argument("--average-with-base", type=float, metavar="A", help=average)
    merge = "add the adapters to the weights (default: export them for peft)"
    parser.add_argument("--merge-lora", action="store_true", help=merge)
    parser.add_argument("--out", type=Path, required=True, help="the directory to create")
    proof = "load it with transformers, and compare its tensors and logits with the trained weights'"
    parser.add_argument("--verify", action="store_true", help=proof)
    gguf = "also write OUT-gguf for llama.cpp and Ollama, with llama.cpp's convert_hf_to_gguf.py, which is this file"
    parser.add_argument("--gguf", type=Path, metavar="CONVERTER", help=gguf)
    release = parser.add_argument_group("a release", "its libraries are optional (requirements.txt says which)")
    bom = "write bom.json, a bill of materials of the model in CycloneDX 1.7"
    release.add_argument("--bom", action="store_true", help=bom)
    release.add_argument("--sign", type=Path, metavar="KEY", help="sign the directory by a private key; implies --bom")
    release.add_argument("--push", metavar="ORG/NAME", help="upload the directory to the Hugging Face hub (private)")
    return parser.parse_args()


def main() -> int:
    """Write the export. Return 1 if --verify finds other weights; such an export is neither signed nor pushed."""
    arguments = parse_arguments()
    if world_size_from_environment()[0] > 1:
        raise UserError("an export is one process; start it as python scripts/export.py, without torchrun")
    check_new(out := arguments.out)
    if arguments.gguf:
        check_new(gguf_directory(out))
        if not arguments.gguf.is_file():
            raise UserError(f"{arguments.gguf} is not there; --gguf needs the convert_hf_to_gguf.py of llama.cpp")
    with process_group(device=torch.device("cpu")) as ranks:
        export = read_export(arguments.run, arguments, ranks)
    if arguments.verify and export.adapter:
        raise UserError(
            "--verify is for whole weights; add --merge-lora, or leave it out: scripts/verify.py reads adapters too"
        )
    if arguments.gguf and export.adapter:
        raise UserError("--gguf converts whole weights; add --merge-lora")
    contents = export.contents
    # The card needs the finished export, but is rendered once before it: if one of its inputs, such as RUN/export/export.json,
    # cannot be read, nothing is written.
    model_card(out, export, read_results(out, export))
    size = write_export(out, export, base_model(export.base)["hub_id"] or str(export.base))
    results = read_results(out, export)
    write_durably(out / CARD, model_card(out, export, results))
    kind = {"model": "", "merged": ", merged", "adapter": ", an adapter"}[contents["kind"]]
    share = (contents["averaged"] or {}).get("share_of_tuned")
    averaged = f", {share:g} x tuned + {1 - share:g} x base" if share is not None else ""
    weights = f"the {contents['weights']} weights of {arguments.run} (step {contents['step']}){kind}{averaged}"
    print(f"{weights} -> {out}: {size / 2**20:,.0f} MiB in {contents['dtype']}")
    if export.registered:
        kept = ", ".join(export.registered)
        print(f"warning: {out} has the trained weights alone; what the checkpoint also has ({kept}) is not in it")
    for sentence in results.left_out:
        print(f"not in the card: {sentence}")
    if arguments.verify:
        is_good, sentence = verify(out, export)
        print(sentence)
        if not is_good:
            return 1
    if arguments.gguf:
        longest = max(LEAST_CONTEXT, export.config.data.length)
        context = min(getattr(export.model_config, "max_position_embeddings", None) or longest, longest)
        chats = chat_settings(export.config.data)
        print(*write_gguf(out, arguments.gguf, export.tokenizer, chats, contents["dtype"], context), sep="\n")
    if arguments.bom or arguments.sign:
        print(write_bom(out, export, results))
    if arguments.sign:
        sign_release(out, arguments.sign)
        print(f"signed: {out / SIGNATURE}")
    if arguments.push:
        print(push(out, arguments.push))
    return 0


if __name__ == "__main__":
    run_script(main)
