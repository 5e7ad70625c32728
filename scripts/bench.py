"""Compare speed and memory with transformers' Trainer and TRL's SFTTrainer: losses first, then A/B/A/B rounds.

    pip install -r requirements-bench.txt          # the other trainers; without them only our own arms run
    python scripts/bench.py --json bench.json      # all settings
    python scripts/bench.py --settings matched --arms trainer --rounds 1      # a short comparison
    python scripts/bench.py --settings skewed --arms ours-2,ours-4 --steps 6      # our own arms alone

Each line of the tables is an arm: one trainer in one configuration. All arms get the same examples, which are token ids: words in
random order, with loss on the second half of each. Each run of an arm is a process of its own: train.py for our arms, and
scripts/bench/peers.py, which has their settings, for the others. It is killed after its last measured step, because saving and
exporting are not compared. An arm uses all cores that this process may use.

parity: in fp32, with the same examples in each step, the loss of each of 20 steps must agree with ours to 1e-3.
matched: the same examples in each step, bf16 matrix products over fp32 weights (ours through FSDP2's mixed precision, the
others through autocast, which keeps the residual stream in fp32), the same AdamW, no activation checkpointing. Examples
are packed if the trainer can pack without cross-document attention.
skewed: as matched, with 16 examples per step whose lengths are spread 1:100. Trainers that pad have to pad here.
defaults: each trainer as in its own quick start. The steps differ, so the losses cannot be compared.

    tokens/s    real tokens per second, without padding, counted in the same way for every arm, after the first step
    spread      (max - min) / median over the rounds; smaller differences between arms are noise
    ours is     our tokens/s divided by the line's: 2.00x means that ours takes half the time
    GiB         peak memory of rank 0 times the ranks: resident, or on CUDA allocated
    1st step    seconds from the start of the process to the end of its first step: imports, loading, warm-up
    loss        of the last step
    differs by  largest difference of a step's loss from ours in the first round, absolute below a loss of 1, relative above

The exit code is 1 if an arm of ours failed or a loss differs. Linux only.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import json
import signal
from pathlib import Path

from common.command_line import add_number, new_parser
from common.durable_files import check_can_write
from common.errors import UserError, run_script
from model.architectures import check_model_directory
from scripts.bench.arms import ARMS, SETTINGS, Benchmark, find_arm, run_all


def main() -> int:
    """Read the command line, run all arms and print the tables. Return the exit code."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model", default="artifacts/models/SmolLM2-135M-Instruct", help="a Hugging Face directory (%(default)s)")
    add("--arms", default=",".join(ARMS), metavar="A,B", help="(%(default)s; ours-N has N ranks; ours always runs)")
    add("--settings", default=",".join(SETTINGS), metavar="A,B", help="(%(default)s)")
    add_number(parser, "--rounds", "each runs every arm once", 2, least=1, metavar="N")
    add_number(parser, "--steps", "measured steps", 3, least=1, metavar="N")
    add("--json", type=Path, metavar="FILE", help="write all measurements of all runs to FILE")
    add("--work", type=Path, default=Path("artifacts/bench"), metavar="DIR", help="examples and logs (%(default)s)")
    arguments = parser.parse_args()
    keys, settings = arguments.arms.split(","), tuple(arguments.settings.split(","))
    arms = tuple(find_arm(key) for key in dict.fromkeys(["ours", *keys]))
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise UserError(f"--settings: {unknown[0]!r} is unknown; choose from {', '.join(SETTINGS)}")
    check_model_directory(arguments.model, "--model")
    if arguments.json:
        check_can_write(arguments.json, "--json")
    # On SIGTERM the context of the current run must still kill its processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    model, work = str(Path(arguments.model).resolve()), arguments.work.resolve()
    report, passed = run_all(Benchmark(model, work, arms, settings, arguments.rounds, arguments.steps))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    run_script(main)
