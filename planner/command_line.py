"""The command line of scripts/plan.py: which run, on which machine, and what is printed."""

import argparse
import dataclasses
from pathlib import Path

from common.durable_files import check_can_write, write_json
from common.errors import UserError
from configs.loading.checks import check_world
from configs.loading.config_file import load_config
from planner.claims import published_table
from planner.cluster import GPU_NAMES, NETWORKS, Cluster, cluster_of, generic_device
from planner.report import GIB, as_json, make_report
from planner.shape import SHAPES
from planner.subject import Assumed, Subject, from_config, from_name
from planner.table import text

PER_NODE = 8  # GPUs of a node, if --nodes is not given
SAVE_BANDWIDTH = 1.0  # GB/s


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Parse sys.argv."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        nargs="*",
        metavar="CONFIG or section.key=value",
        help="a config file, and settings that replace its own",
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--gpus", type=int, default=8, help="GPUs of all nodes together (%(default)s)")
    machine.add_argument("--nodes", type=int, help=f"nodes (as many as {PER_NODE} GPUs a node need)")
    machine.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPU_NAMES)}, or the name CUDA gives it")
    machine.add_argument("--gpu-memory", type=float, metavar="GB", help="of the data sheet (that of --gpu, or 80)")
    machine.add_argument(
        "--network", metavar="NAME|Gb/s", help=f"a node's, all cards together: a number or one of {', '.join(NETWORKS)}"
    )
    machine.add_argument("--host-memory", type=float, default=0, metavar="GiB", help="of a node's host")
    machine.add_argument(
        "--save-bandwidth", type=float, default=SAVE_BANDWIDTH, metavar="GB/s", help="of the disk (%(default)s)"
    )
    assumed = parser.add_argument_group("in place of a config")
    assumed.add_argument(
        "--model", metavar="MODEL", help=f"{', '.join(SHAPES)}, a directory with a config.json, or an id on the hub"
    )
    for field in dataclasses.fields(Assumed):
        default = getattr(Assumed(), field.name)
        option = "--" + field.name.replace("_", "-")
        assumed.add_argument(
            option, type=int, metavar="N", help=f"{ASSUMED_HELP[field.name]} ({default or 'as --sequence'})"
        )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--simulate", action="store_true", help="also simulate a step on fake tensors, which takes a minute"
    )
    output.add_argument("--all", action="store_true", help="list every setting in place of the compact table")
    output.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE as well")
    output.add_argument("--published-table", action="store_true", help="only judge the published rules of thumb")
    output.add_argument("--chart", type=Path, metavar="FILE", help="only draw memory against GPUs into a .png or .svg")
    return parser.parse_intermixed_args()


ASSUMED_HELP = {
    "sequence": "data.sequence_length",
    "examples": "number of examples",
    "length": "tokens of each example",
    "epochs": "optimizer.epochs",
    "global_examples": "batch.global_examples",
    "micro_batch": "batch.micro_batch",
}


def read_cluster(arguments: argparse.Namespace) -> tuple[Cluster, list[str]]:
    """The machine, and what was assumed of it. Raises UserError."""
    if arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus}: a run needs at least one GPU")
    nodes = -(-arguments.gpus // PER_NODE) if arguments.nodes is None else arguments.nodes
    if nodes < 1 or arguments.gpus % nodes:
        raise UserError(
            f"--gpus {arguments.gpus} cannot be spread evenly over {nodes} nodes; --gpus counts the GPUs of all nodes "
            "together, and every node has as many as the others"
        )
    for option in ("gpu_memory", "save_bandwidth"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{option.replace('_', '-')} {value:g} must be above 0")
    if not 0 <= arguments.host_memory < float("inf"):
        raise UserError(f"--host-memory {arguments.host_memory:g} must be 0 (unknown) or more")
    gpu = arguments.gpu or arguments.gpu_memory
    cluster = cluster_of(arguments.gpus, nodes, gpu, arguments.network, int(arguments.host_memory * GIB))
    assumed = []
    if arguments.gpu and arguments.gpu_memory:
        memory = generic_device(arguments.gpu_memory).memory
        cluster = dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, memory=memory))
    if not arguments.gpu:
        assumed.append(f"speeds of a card of that memory (--gpu NAME knows {', '.join(GPU_NAMES[:6])} and others)")
    if arguments.nodes is None and nodes > 1:
        assumed.append(f"{nodes} nodes of {cluster.per_node} GPUs (--nodes)")
    return cluster, assumed


def read_subject(arguments: argparse.Namespace, cluster: Cluster) -> Subject:
    """The model and its data. Raises UserError."""
    given = {f.name: v for f in dataclasses.fields(Assumed) if (v := getattr(arguments, f.name)) is not None}
    for name, value in given.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be 1 or more")
    if arguments.model:
        subject = from_name(arguments.model, Assumed(**given), arguments.what)
        check_world(subject.config, cluster.devices, cluster.per_node)
        return subject
    if not arguments.what:
        raise UserError(f"name a config, e.g. configs/xbrl.py, or a model: --model with one of {', '.join(SHAPES)}")
    if given:
        option = next(iter(given)).replace("_", "-")
        raise UserError(f"--{option} goes with --model; a config says it itself (section.key=value replaces a setting)")
    config = load_config(arguments.what[0], arguments.what[1:])
    check_world(config, cluster.devices, cluster.per_node)
    return from_config(config)


def main(description: str | None = None) -> int:
    """Print the plan that sys.argv asks for. Returns the exit code; raises UserError."""
    arguments = parse_arguments(description)
    for option, path in (("--json", arguments.json), ("--chart", arguments.chart)):
        if path:
            check_can_write(path, option)
    if arguments.chart:
        from planner.chart import draw_memory  # matplotlib takes a second to import

        draw_memory(arguments.chart)
        print(f"wrote {arguments.chart}")
        return 0
    if arguments.published_table:
        print(published_table())
        return 0
    cluster, assumed = read_cluster(arguments)
    subject = read_subject(arguments, cluster)
    report = make_report(subject, cluster, arguments.save_bandwidth * 1e9, tuple(assumed), arguments.simulate)
    print(text(report, arguments.all))
    if arguments.json:
        write_json(arguments.json, as_json(report))
        print(f"\nwrote {arguments.json}")
    return 0
