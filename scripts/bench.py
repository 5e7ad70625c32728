"""Speed and memory beside the peers, in one command: A/B/A/B, medians and spread, parity first.

    pip install -r requirements-bench.txt          # the peers; without them only our own arms run
    python scripts/bench.py --json bench.json      # about 28 minutes on 2 cores; --quick: a few, to see that it works

How to read it. Each line is an arm, run in its own processes on the same examples, tokenised once, loss on the assistant's
tokens alone.

parity: in fp32, on the same examples in the same steps, the loss of every step must agree with ours to 1e-3 (absolute
below 1, relative above). A line above it is excused only by the feature that it names.
matched: the same examples in each step, bf16 products over fp32 weights (ours by FSDP2's mixed precision, the peers by
autocast, which keeps what flows between layers in fp32), the same AdamW, no activation checkpointing; packed where the
arm can pack without a leak.
defaults: each tool as its own quick start has it; steps differ, so losses do not compare.

    tokens/s    real tokens: no padding, counted in the same way for every arm; 2 steps of warm-up before, 1 in
                defaults, where a step is larger
    spread      (largest - smallest) / median over the rounds; differences below it mean nothing
    ours is     our tokens/s divided by the line's: 2.00x means that ours takes half the time
    MFU         FLOPs that the work needs (head for targets alone, attention within documents, no recomputation) per
                second, over the fastest matrix product measured in this run, in bf16 where the processor has it, with all
                threads; one peak for all lines, also for those that compute in fp32
    GiB         most memory: resident, of all processes of the arm together; on CUDA what rank 0 had allocated
    1st step    seconds from starting the process to its first finished step: imports, loading, tokenising, warming up
    loss        of the step that the next column names

Each arm is ended after its last measured step, before it would save anything. On CUDA follows a ladder on a 1B shape
(bench/ladder.py). How each peer is set is the docstring of its file in bench/.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
from importlib import metadata

import torch
from tqdm import tqdm

from bench.arms import ARMS, NOT_INSTALLED, OURS, Arm
from bench.measure import ROOT, Run, watch
from bench.spec import Spec
from bench.table import enough, line, parity_difference, render, result
from bench.workload import Workload, make_workload
from common.dtypes import has_native_bf16
from common.errors import UserError, run_script
from data.tokens import load_tokenizer
from model.architectures import read_model_config
from model.flops import Work, count_work, step_flops
from model.language_model import build_on_meta

PARITY = 1e-3
PARITY_RATE, MATCHED_RATE = 1e-4, 2e-5
FULL = {
    "rounds": 2,
    "warmup": 2,
    "steps": 4,
    "parity_steps": 20,
    "lengths": "100,400",
    "settings": "parity,matched,defaults",
}
QUICK = {"rounds": 1, "warmup": 1, "steps": 2, "parity_steps": 5, "lengths": "100,130", "settings": "parity,matched"}
VERSIONS = ("torch", "transformers", "trl", "litgpt", "lightning", "accelerate", "datasets", "torchao")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the command line decided, for all runs."""

    model: str
    device: str
    dtype: str
    work: pathlib.Path
    environment: dict[str, str]
    arms: tuple[Arm, ...]
    settings: tuple[str, ...]
    rounds: int
    warmup: int
    steps: int
    parity_steps: int
    seconds: float
    timeout: float
    work_of_a_step: Work

    def warmup_of(self, setting: str) -> int:
        """Steps that are not measured: one less in `defaults`, whose steps are larger."""
        return max(min(1, self.warmup), self.warmup - 1) if setting == "defaults" else self.warmup


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = ",".join(arm.key for arm in ARMS)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every number of every run")
    parser.add_argument("--model", default="artifacts/models/SmolLM2-135M-Instruct", help="a Hugging Face folder")
    parser.add_argument("--arms", default=keys, metavar="A,B", help=f"some of {keys}")
    parser.add_argument("--settings", metavar="A,B", help="some of parity,matched,defaults")
    parser.add_argument("--rounds", type=int, metavar="N", help="times that all arms run")
    parser.add_argument("--warmup", type=int, metavar="N", help="first steps that are not measured; in defaults 1 less")
    parser.add_argument("--steps", type=int, metavar="N", help="steps that are measured")
    parser.add_argument("--parity-steps", type=int, metavar="N", help="steps compared in fp32")
    parser.add_argument("--seconds", type=float, default=15, help="in defaults: no more steps once two took this long")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which an arm is given up")
    parser.add_argument("--threads", type=int, help="cores for each arm; default: all this process may use")
    parser.add_argument("--lengths", metavar="FROM,TO", help="tokens of an example")
    parser.add_argument("--quick", action="store_true", help=f"instead of {_shown(FULL)}: {_shown(QUICK)}")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("artifacts/bench"), help="its own folder")
    parser.add_argument("--ladder-on-cpu", action="store_true", help="the ladder in miniature, without CUDA")
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def prepare(arguments: argparse.Namespace) -> Bench:
    """Check the arguments, limit this process and its children to the chosen cores. Raises UserError."""
    keys = {arm.key: arm for arm in ARMS}
    chosen, settings = arguments.arms.split(","), arguments.settings.split(",")
    for name, values, allowed in (
        ("--arms", chosen, keys),
        ("--settings", settings, ("parity", "matched", "defaults")),
    ):
        if unknown := [value for value in values if value not in allowed]:
            raise UserError(f"{name}: {unknown[0]!r} is none of {', '.join(allowed)}")
    if not pathlib.Path(arguments.model, "config.json").is_file():
        raise UserError(
            f"{arguments.model} holds no model; python scripts/fetch_base_model.py brings SmolLM2-135M there"
        )
    for name in ("rounds", "steps", "parity_steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(arguments, name)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    threads = min(arguments.threads or len(cores), len(cores))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[:threads])
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    config = read_model_config(arguments.model)
    shutil.rmtree(arguments.work / "runs", ignore_errors=True)
    return Bench(
        model=str(pathlib.Path(arguments.model).resolve()),
        device=device,
        dtype="bf16" if has_native_bf16(torch.device(device)) else "fp32",
        work=arguments.work.resolve(),
        environment=environment,
        arms=tuple(keys[key] for key in keys if key in chosen),
        settings=tuple(settings),
        work_of_a_step=count_work(build_on_meta(config), config),
        **{
            name: getattr(arguments, name)
            for name in ("rounds", "warmup", "steps", "parity_steps", "seconds", "timeout")
        },
    )


def make_workloads(bench: Bench, lengths: str) -> dict[str, Workload]:
    """The examples of each setting: short ones for parity, 8 in a step when matched, 16 in our own defaults."""
    try:
        shortest, longest = (int(text) for text in lengths.split(","))
    except ValueError as error:
        raise UserError(f"--lengths must be two whole numbers, as 100,400, not {lengths!r}") from error
    steps = bench.warmup + bench.steps + 1  # one more, because ours would save after its last
    shapes = {
        "parity": (bench.parity_steps + 1, 2, shortest, min(longest, shortest + 30)),
        "matched": (steps, 8, shortest, longest),
        "defaults": (steps, 16, shortest, longest),
    }
    tokenizer = load_tokenizer(bench.model)
    return {name: make_workload(bench.work / "data" / name, tokenizer, *shapes[name]) for name in bench.settings}


def run_arm(bench: Bench, arm: Arm, setting: str, workload: Workload, number: int) -> Run:
    """One run of one arm. What it printed stays in its folder below `bench.work`."""
    directory = bench.work / "runs" / f"{setting}-{number}" / arm.key
    directory.mkdir(parents=True)
    measured = bench.parity_steps if setting == "parity" else bench.warmup + bench.steps
    spec = Spec(
        setting=setting,
        packed=arm.packed,
        completed=arm.completed,
        device=bench.device,
        model=str(litgpt_folder(bench)) if arm.module == "litgpt" else bench.model,
        dtype="fp32" if setting == "parity" else bench.dtype,
        jsonl=str(workload.jsonl),
        tokens=str(workload.tokens),
        directory=str(directory),
        steps=workload.steps,
        lengths=workload.lengths,
        targets=workload.targets,
        sequence_length=workload.sequence_length,
        batch=len(workload.steps[0]),
        max_steps=measured + 1,
        learning_rate=PARITY_RATE if setting == "parity" else MATCHED_RATE,
    )
    if setting == "defaults":
        stop = functools.partial(enough, warmup=bench.warmup_of(setting), steps=bench.steps, seconds=bench.seconds)
    else:
        stop = functools.partial(enough, warmup=0, steps=measured, seconds=math.inf)
    rows_file, read_row = arm.rows(spec)
    return watch(
        arm.command(spec), bench.environment, rows_file, read_row, stop, directory / "output.txt", bench.timeout
    )


def litgpt_folder(bench: Bench) -> pathlib.Path:
    """The model in LitGPT's form, converted once; the folder's name tells LitGPT the shape."""
    return bench.work / "litgpt" / pathlib.Path(bench.model).name


def why_not(bench: Bench, arm: Arm) -> str:
    """Why an arm cannot run here, in words; empty where it can. Converts the model for LitGPT."""
    if arm.missing():
        return NOT_INSTALLED
    if bench.device == "cuda" and arm.ranks > torch.cuda.device_count():
        return f"needs {arm.ranks} GPUs, there is {torch.cuda.device_count()}"
    folder = litgpt_folder(bench)
    if arm.module == "litgpt" and not (folder / "lit_model.pth").is_file():
        command = [sys.executable, "-m", "bench.litgpt", "--convert", bench.model, str(folder)]
        answer = subprocess.run(command, cwd=ROOT, env=bench.environment, capture_output=True, text=True)
        if answer.returncode:
            return f"LitGPT cannot convert the model: {answer.stderr.strip().splitlines()[-1]}"
    return ""


def measure_peak(bench: Bench) -> float:
    """FLOP/s of the fastest matrix product, in a process of its own with the arms' threads."""
    command = [sys.executable, "-m", "bench.peak", bench.device, bench.dtype]
    return json.loads(subprocess.check_output(command, cwd=ROOT, env=bench.environment, text=True))


def compare_losses(bench: Bench, runs: dict[str, Run], reasons: dict[str, str]) -> list[dict]:
    """For each arm its losses, the largest difference from ours in fp32, and a verdict in words; ours comes first."""
    losses = {name: [row["loss"] for row in run.rows[: bench.parity_steps]] for name, run in runs.items()}
    found = []
    for arm in bench.arms:
        difference = parity_difference(losses.get(OURS, []), losses.get(arm.name, []))
        if reasons[arm.name] or runs[arm.name].failed:
            verdict = reasons[arm.name] or f"failed: {runs[arm.name].failed}"
        elif arm.name == OURS:
            verdict = f"from {losses[OURS][0]:.4f} to {losses[OURS][-1]:.4f}"
        elif difference <= PARITY:
            verdict = "agrees"
        else:
            verdict = f"excused: {arm.lacks}" if arm.lacks else "DIFFERS"
        found.append({"arm": arm.name, "difference": difference, "verdict": verdict, "losses": losses.get(arm.name)})
    return found


def main() -> int:
    """All runs, then the tables. Exit code 1 where one of our own arms failed or a peer differs without excuse."""
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run that is going on is ended too
    bench = prepare(arguments)
    workloads = make_workloads(bench, arguments.lengths)
    reasons = {arm.name: why_not(bench, arm) for arm in bench.arms}
    able = [arm for arm in bench.arms if not reasons[arm.name]]
    jobs = [("parity", 0, arm) for arm in able if "parity" in bench.settings]
    for number in range(bench.rounds):
        jobs += [(s, number, arm) for s in bench.settings if s != "parity" for arm in able if s in arm.settings]
    runs: dict[str, dict[str, list[Run]]] = {setting: {} for setting in bench.settings}
    peaks = [measure_peak(bench)]
    bar = tqdm(jobs, unit="run", dynamic_ncols=True)
    for i, (setting, number, arm) in enumerate(bar):
        bar.set_description(f"{setting}, {arm.name}")
        run = run_arm(bench, arm, setting, workloads[setting], number)
        runs[setting].setdefault(arm.name, []).append(run)
        if run.failed:
            tqdm.write(f"{setting}, {arm.name}: {run.failed}", file=sys.stderr)
        if i + 1 == len(jobs) or jobs[i + 1][1] != number:
            peaks.append(measure_peak(bench))
    report = {"peaks": peaks} | describe(bench)
    passed = print_parity(bench, runs, reasons, report) if "parity" in bench.settings else True
    for setting in bench.settings:
        if setting != "parity":
            passed &= print_setting(bench, setting, runs[setting], reasons, report)
    print_ladder(bench, arguments.ladder_on_cpu, report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0 if passed else 1


def describe(bench: Bench) -> dict:
    """The machine and what runs on it."""
    versions = {name: _version(name) for name in VERSIONS}
    processor = platform.processor() or platform.machine()
    if bench.device == "cuda":
        processor = torch.cuda.get_device_name(0)
    elif os.path.isfile("/proc/cpuinfo"):
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
        processor = next((row.split(":", 1)[1].strip() for row in text.splitlines() if "model name" in row), processor)
    return {
        "processor": processor,
        "threads": int(bench.environment["OMP_NUM_THREADS"]),
        "dtype": bench.dtype,
        "model": pathlib.Path(bench.model).name,
        "versions": versions,
        "warmup": bench.warmup,
        "rounds": bench.rounds,
    }


def print_parity(bench: Bench, runs: dict[str, dict[str, list[Run]]], reasons: dict[str, str], report: dict) -> bool:
    """The differences from our losses; whether our arms ran and every other agrees, is excused or is not here."""
    single = {name: several[0] for name, several in runs["parity"].items()}
    report["parity"] = compare_losses(bench, single, reasons)
    print(f"\nparity: largest difference of a loss from ours, fp32, {bench.parity_steps} steps, bound {PARITY:g}")
    for found in report["parity"]:
        print(f"  {found['arm']:<34}{found['difference']:>10.1e}  {found['verdict']}")
    own = {arm.name for arm in bench.arms if arm.module is None}
    verdicts = {found["arm"]: found["verdict"] for found in report["parity"]}
    return "DIFFERS" not in verdicts.values() and not any(verdicts[name].startswith("failed") for name in own)


def print_setting(
    bench: Bench, setting: str, runs: dict[str, list[Run]], reasons: dict[str, str], report: dict
) -> bool:
    """The table of a setting; whether all of our own arms ran."""
    peak = max(report["peaks"])
    lines, rounds = {}, {}
    for arm in bench.arms:
        if setting not in arm.settings:
            continue
        failed = next((run.failed for run in runs.get(arm.name, ()) if run.failed), "")
        if reasons[arm.name] or failed:
            lines[arm.name] = reasons[arm.name] or f"failed: {failed}"
            continue
        needs = functools.partial(step_flops, bench.work_of_a_step)
        rounds[arm.name] = [
            result(run, bench.warmup_of(setting), needs, bench.device == "cuda") for run in runs[arm.name]
        ]
        lines[arm.name] = line(rounds[arm.name], peak, bench.warmup + bench.steps)
    report[setting] = {
        name: entry if isinstance(entry, str) else dataclasses.asdict(entry) | {"rounds": _dicts(rounds[name])}
        for name, entry in lines.items()
    }
    print(f"\n{render(setting, lines, OURS)}")
    print(
        f"{report['processor']}, {report['threads']} threads, {bench.rounds} rounds, peak {peak / 1e12:.2f} TFLOP/s: the largest "
        f"of {', '.join(f'{p / 1e12:.2f}' for p in report['peaks'])} ({bench.dtype}); "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    )
    own = {arm.name for arm in bench.arms if arm.module is None and not reasons[arm.name]}
    return not any(isinstance(lines.get(name), str) for name in own)


def print_ladder(bench: Bench, on_cpu: bool, report: dict) -> None:
    """What each measure brings on a 1B shape: bench/ladder.py in its own process."""
    if bench.device == "cpu" and not on_cpu:
        print("\nladder on a 1B shape: needs CUDA, skipped")
        return
    sys.stdout.flush()  # before another process prints
    file = bench.work / "ladder.json"
    command = [sys.executable, "-m", "bench.ladder", str(file), "--device", bench.device]
    subprocess.run(command, cwd=ROOT, env=bench.environment, check=True)
    report["ladder"] = json.loads(file.read_text(encoding="utf-8"))


def _shown(values: dict) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def _dicts(results: list) -> list[dict]:
    return [dataclasses.asdict(one) for one in results]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    run_script(main)
