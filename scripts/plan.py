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
from configs.loading.config_file import load_config, override
from configs.loading.deepspeed import from_deepspeed
from distributed.process_group import world_size_from_environment
from tools import plan
from tools.machines import GPU_NAMES, NETWORKS
from tools.plan_text import as_json, beside, text

end_imports()

MACHINE = ("gpus", "nodes", "gpu", "gpu_memory", "network", "host_memory")


def parse_arguments() -> argparse.Namespace:
    """Parse sys.argv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="CONFIG or section.key=value", help="a config, and settings that replace its own")
    add("--deepspeed", metavar="FILE", help="apply the settings of a DeepSpeed JSON file to the config")
    add = parser.add_argument_group("the machine").add_argument
    add("--gpus", type=int, default=8, help="GPUs of all nodes together (%(default)s)")
    add("--nodes", type=int, help=f"nodes (as many as {plan.PER_NODE} GPUs a node need)")
    add("--gpu", metavar="NAME", help=f"one of {', '.join(GPU_NAMES)}, or the name CUDA gives it")
    add("--gpu-memory", type=float, metavar="GB", help="of the data sheet (that of --gpu, or 80)")
    add("--network", metavar="NAME|Gb/s", help=f"a node's cards together: a number or one of {', '.join(NETWORKS)}")
    add("--host-memory", type=float, metavar="GiB", help="of a node's host")
    add("--save-bandwidth", type=float, default=1.0, metavar="GB/s", help="of the disk (%(default)s)")
    add("--here", action="store_true", help="this machine and torchrun's ranks, or one: as train.py --dry-run")
    add = parser.add_argument_group("in place of a config").add_argument
    add("--model", help=f"{', '.join(plan.SHAPES)}, a directory with a config.json, or an id on the hub")
    for key in dataclasses.fields(plan.Assumed):
        words = f"{key.metadata['help']} ({key.default or 'as --sequence'})"
        add("--" + key.name.replace("_", "-"), type=int, metavar="N", help=words)
    add = parser.add_argument_group("output").add_argument
    add("--all", action="store_true", help="list every setting in place of the compact table")
    add("--json", type=Path, metavar="FILE", help="write everything to FILE as well")
    against = "only compare the plan with the metrics of this run of the config, on the machine that it ran on"
    add("--against", type=Path, metavar="runs/NAME", help=against)
    return parser.parse_intermixed_args()


def check_numbers(arguments: argparse.Namespace) -> dict[str, int]:
    """The options that go with --model and were given. Raises UserError for a number that makes no sense."""
    given = {key.name: getattr(arguments, key.name) for key in dataclasses.fields(plan.Assumed)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("gpus", "nodes", "gpu_memory", "host_memory", "save_bandwidth", *given):
        value, option = getattr(arguments, name), "--" + name.replace("_", "-")
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{option} {value:g} must be above 0")
        if name in given and not arguments.model:
            raise UserError(
                f"{option} goes with --model; a config says it itself (section.key=value replaces a setting)"
            )
    if not (arguments.model or arguments.what):
        raise UserError(
            f"name a config, e.g. configs/xbrl.py, or a model: --model with one of {', '.join(plan.SHAPES)}"
        )
    return given


def main() -> int:
    """Print the plan that sys.argv asks for. Returns the exit code; raises UserError."""
    arguments = parse_arguments()
    if arguments.here and int(os.environ.get("RANK", 0)):
        return 0  # rank 0 plans for all
    given, bandwidth = check_numbers(arguments), arguments.save_bandwidth * 1e9
    if arguments.json:
        check_can_write(arguments.json, "--json")
    machine = {name: getattr(arguments, name) for name in MACHINE}
    cluster, assumed = plan.described_cluster(**machine)
    if arguments.model:
        subject = plan.assumed_subject(arguments.model, plan.Assumed(**given), arguments.what, cluster)
    else:
        config = load_config(arguments.what[0])
        if arguments.deepspeed:
            ranks = world_size_from_environment()[0] if arguments.here else cluster.devices
            config, _ = from_deepspeed(config, arguments.deepspeed, ranks)
        config = override(config, arguments.what[1:])
        if arguments.against:
            print(beside(plan.plan_of_run(config, arguments.against), plan.measured(arguments.against)))
            return 0
        if arguments.here:
            (config, cluster), assumed = plan.this_machine(config), []
        subject = plan.read_subject(config, cluster)
    found = plan.search(subject)
    print(text(found, assumed, bandwidth, arguments.all))
    if arguments.json:
        write_json(arguments.json, as_json(found, assumed, bandwidth))
        print(f"\nwrote {arguments.json}")
    return 0


if __name__ == "__main__":
    run_script(main)
