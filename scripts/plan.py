"""Plan a run before a machine is rented: memory, time, disk, and the cheapest settings that fit. Nothing is trained.

python scripts/plan.py configs/xbrl.py --gpus 8 --gpu-memory 80
python scripts/plan.py configs/xbrl.py --gpus 8 --gpu H100 sharding.strategy=full batch.micro_batch=2
python scripts/plan.py --model 70B --sequence 4096 --gpus 16 --gpu H200
python scripts/plan.py configs/quickstart.py --against runs/quickstart

The config's data is read and its real steps are dealt to the GPUs; of the model only config.json and the tokenizer are
needed. With --model there need be no data: all examples then have the same length. docs/planning.md explains the output.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from common.lean_imports import begin_imports, end_imports

begin_imports()
import argparse
import dataclasses
import os
from pathlib import Path

from common.durable_files import check_can_write, write_json
from common.errors import UserError, run_script
from configs.config import Config
from configs.loading.config_file import load_config, override
from configs.loading.deepspeed import from_deepspeed
from tools.machines import GPU_NAMES, NETWORKS, Cluster, cluster_of, generic_device
from tools.plan import (
    SHAPES,
    Assumed,
    assumed_subject,
    cluster_of_run,
    measured,
    own_plan,
    read_subject,
    search,
    this_machine,
)
from tools.plan_text import GIB, as_json, beside, text

end_imports()

PER_NODE = 8  # GPUs of a node, if --nodes is not given


def parse_arguments() -> argparse.Namespace:
    """Parse sys.argv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "a config file, and settings that replace its own"
    parser.add_argument("what", nargs="*", metavar="CONFIG or section.key=value", help=what)
    parser.add_argument("--deepspeed", metavar="FILE", help="apply the settings of a DeepSpeed JSON file to the config")
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--gpus", type=int, default=8, help="GPUs of all nodes together (%(default)s)")
    machine.add_argument("--nodes", type=int, help=f"nodes (as many as {PER_NODE} GPUs a node need)")
    machine.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPU_NAMES)}, or the name CUDA gives it")
    machine.add_argument("--gpu-memory", type=float, metavar="GB", help="of the data sheet (that of --gpu, or 80)")
    network = f"a node's, all cards together: a number or one of {', '.join(NETWORKS)}"
    machine.add_argument("--network", metavar="NAME|Gb/s", help=network)
    machine.add_argument("--host-memory", type=float, default=0, metavar="GiB", help="of a node's host")
    bandwidth = "of the disk (%(default)s)"
    machine.add_argument("--save-bandwidth", type=float, default=1.0, metavar="GB/s", help=bandwidth)
    here = "this machine, with the ranks of torchrun or one: what train.py --dry-run plans"
    machine.add_argument("--here", action="store_true", help=here)
    assumed = parser.add_argument_group("in place of a config")
    models = f"{', '.join(SHAPES)}, a directory with a config.json, or an id on the hub"
    assumed.add_argument("--model", metavar="MODEL", help=models)
    for key in dataclasses.fields(Assumed):
        words = f"{key.metadata['help']} ({key.default or 'as --sequence'})"
        assumed.add_argument("--" + key.name.replace("_", "-"), type=int, metavar="N", help=words)
    output = parser.add_argument_group("output")
    output.add_argument("--all", action="store_true", help="list every setting in place of the compact table")
    output.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE as well")
    against = "only compare the plan with the metrics of this run of the config, on the machine that it ran on"
    output.add_argument("--against", type=Path, metavar="runs/NAME", help=against)
    return parser.parse_intermixed_args()


def read_cluster(arguments: argparse.Namespace) -> tuple[Cluster, list[str]]:
    """The machine, and what was assumed of it. Raises UserError."""
    gpus = arguments.gpus
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: a run needs at least one GPU")
    nodes = -(-gpus // PER_NODE) if arguments.nodes is None else arguments.nodes
    if nodes < 1 or gpus % nodes:
        raise UserError(
            f"--gpus {gpus} cannot be spread evenly over {nodes} nodes; --gpus counts the GPUs of all nodes together, and every "
            "node has as many as the others"
        )
    for option in ("gpu_memory", "save_bandwidth"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{option.replace('_', '-')} {value:g} must be above 0")
    if not 0 <= arguments.host_memory < float("inf"):
        raise UserError(f"--host-memory {arguments.host_memory:g} must be 0 (unknown) or more")
    host = int(arguments.host_memory * GIB)
    cluster = cluster_of(gpus, nodes, arguments.gpu or arguments.gpu_memory, arguments.network, host)
    if arguments.gpu and arguments.gpu_memory:
        device = dataclasses.replace(cluster.device, memory=generic_device(arguments.gpu_memory).memory)
        cluster = dataclasses.replace(cluster, device=device)
    assumed = []
    if not arguments.gpu:
        assumed.append(f"speeds of a card of that memory (--gpu NAME knows {', '.join(GPU_NAMES[:6])} and others)")
    if arguments.nodes is None and nodes > 1:
        assumed.append(f"{nodes} nodes of {cluster.per_node} GPUs (--nodes)")
    return cluster, assumed


def read_config(arguments: argparse.Namespace, ranks: int) -> Config:
    """The config with what replaces its settings. Raises UserError."""
    if not arguments.what:
        raise UserError(f"name a config, e.g. configs/xbrl.py, or a model: --model with one of {', '.join(SHAPES)}")
    config = load_config(arguments.what[0])
    if arguments.deepspeed:
        config, _ = from_deepspeed(config, arguments.deepspeed, ranks)
    return override(config, arguments.what[1:])


def main() -> int:
    """Print the plan that sys.argv asks for. Returns the exit code; raises UserError."""
    arguments = parse_arguments()
    if arguments.here and int(os.environ.get("RANK", 0)):
        return 0  # rank 0 plans for all
    if arguments.json:
        check_can_write(arguments.json, "--json")
    given = {key.name: v for key in dataclasses.fields(Assumed) if (v := getattr(arguments, key.name)) is not None}
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if not arguments.model:
            raise UserError(
                f"{option} goes with --model; a config says it itself (section.key=value replaces a setting)"
            )
        if value < 1:
            raise UserError(f"{option} {value} must be 1 or more")
    cluster, assumed = read_cluster(arguments)
    if arguments.model:
        subject = assumed_subject(arguments.model, Assumed(**given), arguments.what, cluster)
    else:
        config = read_config(arguments, int(os.environ.get("WORLD_SIZE", 1)) if arguments.here else cluster.devices)
        if arguments.against:
            cluster = cluster_of_run(arguments.against, config)
            print(beside(own_plan(read_subject(config, cluster)), measured(arguments.against)))
            return 0
        if arguments.here:
            config, cluster = this_machine(config)
            assumed = []
        subject = read_subject(config, cluster)
    found = search(subject)
    print(text(found, assumed, arguments.save_bandwidth * 1e9, arguments.all))
    if arguments.json:
        write_json(arguments.json, as_json(found, assumed, arguments.save_bandwidth * 1e9))
        print(f"\nwrote {arguments.json}")
    return 0


if __name__ == "__main__":
    run_script(main)
