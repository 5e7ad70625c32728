"""The command line of scripts/plan.py."""

import argparse
import os
import textwrap
from dataclasses import replace
from pathlib import Path

from common.command_line import add_number, new_parser
from common.errors import UserError
from configs.load import load_with_deepspeed
from distributed.process_group import world_size_from_environment
from scripts.plan.against import compare_with_run
from scripts.plan.machines import GPU_NAMES, PER_NODE, Cluster, cluster_of, generic_device, named_device, this_machine
from scripts.plan.models import SIZES
from scripts.plan.report import WIDTH, text
from scripts.plan.search import search
from scripts.plan.subject import ASSUMED, assumed_subject, read_subject


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Parse sys.argv."""
    parser = new_parser(description)
    add = parser.add_argument
    add("what", nargs="*", metavar="CONFIG or section.key=value", help="a config, and settings that replace its own")
    add("--deepspeed", metavar="FILE", help="apply the settings of a DeepSpeed JSON file to the config")
    machine = parser.add_argument_group("the machine")
    add = machine.add_argument
    add_number(machine, "--gpus", "GPUs of all nodes together", 8, least=1)
    add_number(machine, "--nodes", f"nodes (as many as {PER_NODE} GPUs a node need)", least=1)
    add("--gpu", metavar="NAME", help=f"one of {', '.join(GPU_NAMES)}, or the name CUDA gives it")
    add_number(machine, "--gpu-memory", "of the data sheet (that of --gpu, or 80)", kind=float, least=1, metavar="GB")
    add_number(machine, "--network", "of all cards of a node together", kind=float, least=1, metavar="Gb/s")
    add("--here", action="store_true", help="this machine and torchrun's ranks, or one: as train.py --dry-run")
    instead = parser.add_argument_group("in place of a config")
    instead.add_argument("--model", help=f"{', '.join(SIZES)}, a directory with a config.json, or an id on the hub")
    for name, (value, words) in ASSUMED.items():
        add_number(instead, _option(name), f"{words} ({value or 'as --sequence'})", least=1, metavar="N")
    add = parser.add_argument_group("output").add_argument
    add("--all", action="store_true", help="list every setting, and not only the best of each strategy and memory")
    against = "only compare the plan with the metrics of this run of the config, on the machine that it ran on"
    add("--against", type=Path, metavar="runs/NAME", help=against)
    return parser.parse_intermixed_args()


def check_arguments(arguments: argparse.Namespace) -> dict[str, int]:
    """Return the options of `ASSUMED` that were typed. Raise UserError for options that exclude each other."""
    assumed = {name: value for name in ASSUMED if (value := getattr(arguments, name)) is not None}
    if assumed and not arguments.model:
        option = _option(next(iter(assumed)))
        raise UserError(f"{option} goes with --model; a config says it itself (section.key=value replaces a setting)")
    if arguments.model and (arguments.deepspeed or arguments.against or arguments.here):
        raise UserError("--deepspeed, --against and --here go with a config, not with --model")
    if not (arguments.model or arguments.what):
        message = f"name a config, e.g. configs/quickstart.py, or a model: --model with one of {', '.join(SIZES)}"
        raise UserError(message)
    return assumed


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def described_cluster(arguments: argparse.Namespace) -> tuple[Cluster, list[str]]:
    """Return the machine that the options describe, and the assumptions about it, in words. Raise UserError for mistakes."""
    gpu, gigabytes = arguments.gpu, arguments.gpu_memory
    device, assumed = named_device(gpu) if gpu else generic_device(gigabytes or 80), []
    if gpu and gigabytes:
        device = replace(device, memory=generic_device(gigabytes).memory)
    nodes = arguments.nodes or -(-arguments.gpus // PER_NODE)
    cluster = cluster_of(arguments.gpus, nodes, device, arguments.network)
    if not gpu:
        assumed.append(f"speeds of a card of that memory (--gpu NAME knows {', '.join(GPU_NAMES[:6])} and others)")
    if arguments.nodes is None and nodes > 1:
        assumed.append(f"{nodes} nodes of {cluster.per_node} GPUs (--nodes)")
    return cluster, assumed


def main(description: str | None = None) -> int:
    """Print the plan that sys.argv asks for, and return the exit code. Raise UserError for mistakes."""
    arguments = parse_arguments(description)
    if arguments.here and int(os.environ.get("RANK", 0)):
        return 0  # rank 0 plans for all
    options = check_arguments(arguments)
    cluster, assumed = described_cluster(arguments)
    if arguments.model:
        subject = assumed_subject(arguments.model, arguments.what, cluster, **options)
    else:
        path, *overrides = arguments.what
        ranks = world_size_from_environment()[0] if arguments.here else cluster.devices
        config, notes = load_with_deepspeed(path, overrides, arguments.deepspeed, ranks)
        if arguments.against:
            print(compare_with_run(config, arguments.against))
            return 0
        if arguments.here:
            (config, cluster), assumed = this_machine(config), []
            if cluster.devices != world_size_from_environment()[0]:
                assumed = [
                    f"{cluster.devices} processes, which sharding.context={cluster.devices} needs: start them with torchrun"
                ]
        for note in notes:
            print("\n".join(textwrap.wrap(note, WIDTH, subsequent_indent="  ", break_long_words=False)))
        subject = read_subject(config, cluster)
    print(text(search(subject), assumed, arguments.all))
    return 0
