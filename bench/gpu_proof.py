"""Prove the CUDA path on a machine with a GPU, in four parts of at most 10 minutes each: bash scripts/gpu_proof.sh

    part 1    the tests that need a GPU
    part 2    losses and gradients against the CPU, in fp32 and bf16; the varlen kernel against eager attention
    part 3    the ladder of bench/ladder.py (tokens/s, MFU, peak memory), and the planner's errors on each of its rungs
    part 4    stop, kill and resume, equal to the bit; with asynchronous saves too

A finished step is kept, so the same command continues after a part has run out of time; a step that failed is done again.
Results go to one JSON file, and to a table in Markdown beside it, with the card, driver and versions. Exit code 0: all steps
are good; 1: a step failed or is left; 2: there is no GPU. --rehearse runs the same programs with tiny sizes on the CPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from bench.gpu_planner import planner_rows
from bench.gpu_steps import PARTS, Result, Step, make_steps
from bench.report import processor_name, version
from common.errors import UserError, run_script

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 10.0  # of one part


def machine(rehearse: bool) -> dict[str, object]:
    """Card, driver and versions."""
    found: dict[str, object] = {name: version(name) for name in ("torch", "transformers", "torchao")}
    found["python"] = sys.version.split()[0]
    if rehearse:
        return found | {"rehearsal": True, "card": processor_name("cpu"), "gpus": 0}
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = "unknown"
    return found | {
        "rehearsal": False,
        "card": torch.cuda.get_device_name(0),
        "gpus": torch.cuda.device_count(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def run_step(step: Step, rehearse: bool, seconds: float) -> Result:
    """Run one program, at most so long. A program that fails is a result with ok=False and its last line."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    step.out.unlink(missing_ok=True)
    begin, log = time.monotonic(), step.out.with_suffix(".log")
    code, output, errors = run_program(step.command, environment, max(1.0, seconds))
    log.write_text(output + errors, encoding="utf-8")
    if code is None:
        return {"ok": False, "text": f"not finished in {seconds / 60:.1f} minutes", "seconds": round(seconds, 1)}
    if str(step.out) not in " ".join(step.command) and code == 0:
        step.out.write_text(output, encoding="utf-8")
    if step.out.is_file():  # pytest has an exit code for failed tests, and its report all the same
        result = step.read(step.out)
    else:
        lines = (errors.strip() or output.strip() or f"exit code {code}").splitlines()
        result = {"ok": False, "text": f"{lines[-1][:300]} (all in {log})"}
    return result | {"seconds": round(time.monotonic() - begin, 1)}


def run_program(command: tuple[str, ...], environment: dict[str, str], seconds: float) -> tuple[int | None, str, str]:
    """(exit code, standard output, standard error); the code is None if time ran out. Nothing that it started outlives it."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
            return process.returncode, output, errors
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # tests.gpu.resume ends its runs, which have sessions of their own
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=20)
            return None, "", ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run_part(part: int, steps: list[Step], report: dict, out: Path, minutes: float) -> bool:
    """Run the steps of a part that are not good yet, as long as there is time. True if all are good."""
    rehearse, end = report["machine"]["rehearsal"], time.monotonic() + 60 * minutes
    results = report["parts"].setdefault(str(part), {})
    print(f"part {part}, {PARTS[part]}{' (a rehearsal on the CPU)' if rehearse else ''}", flush=True)
    left = []
    for step in [step for step in steps if step.part == part]:
        if not results.get(step.name, {}).get("ok"):
            if time.monotonic() > end:
                left.append(step.name)
                continue
            results[step.name] = run_step(step, rehearse, end - time.monotonic())
        line(step.name, results[step.name])
        if part == 3:
            add_planner(results, "cpu" if rehearse else "cuda")
        save(report, out)
    if "planner" in results:
        line("planner", results["planner"])
    if left:
        print(f"  no time left for {', '.join(left)}; start the same command again to continue")
    return not left and all(result["ok"] for result in results.values())


def add_planner(results: dict, device: str) -> None:
    """The planner's errors for all rungs that are measured."""
    if results["peak"].get("flops") and (rows := planner_rows(results, device, results["peak"]["flops"])):
        errors = [abs(row["memory_error"]) for row in rows if "memory_error" in row]
        inside = sum(row["in_range"] for row in rows)
        text = f"speed within the planned range for {inside} of {len(rows)}"
        text += f"; memory off by {max(errors):.1%} at most" if errors else ""
        results["planner"] = {"ok": True, "text": text, "rows": rows}


def line(name: str, result: Result) -> None:
    print(f"  {'ok   ' if result['ok'] else 'FAILS'} {name}: {result['text']}", flush=True)


def save(report: dict, out: Path) -> None:
    out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def markdown(report: dict) -> str:
    """The tables for docs/gpu.md."""
    found = report["machine"]
    where = ", ".join(
        f"{key} {value}" for key, value in found.items() if value and key not in ("rehearsal", "card", "gpus")
    )
    text = ["**A rehearsal on a CPU with tiny sizes: proves nothing about a GPU.**", ""] if found["rehearsal"] else []
    text += [
        f"{found['gpus']} x {found['card']}; {where}",
        "",
        "| part | step | result | seconds | found |",
        "|---|---|---|---|---|",
    ]
    for part, results in report["parts"].items():
        for name, result in results.items():
            verdict = "good" if result["ok"] else "**fails**"
            text.append(
                f"| {part} | {name} | {verdict} | {result.get('seconds', '')} | {result['text'].replace('|', '/')} |"
            )
    ladder = report["parts"].get("3", {})
    if peak := ladder.get("peak", {}).get("flops"):
        text += [
            "",
            "| rung | tokens/s | MFU | GiB | planned GiB | error | planned tokens/s |",
            "|---|---|---|---|---|---|---|",
        ]
        planned = {row["rung"]: row for row in ladder.get("planner", {}).get("rows", ())}
        for key, rung in ladder.items():
            if "flops_per_second" in rung:
                cells = [rung["name"], f"{rung['tokens_per_second']:,.0f}", f"{rung['flops_per_second'] / peak:.1%}"]
                text.append(
                    "| " + " | ".join([*cells, f"{rung['memory_gib']:.2f}", *planned_cells(planned.get(key))]) + " |"
                )
    return "\n".join(text) + "\n"


def planned_cells(row: dict | None) -> list[str]:
    """planned GiB, its error, planned tokens/s; empty where nothing is planned."""
    memory = [f"{row['planned_gib']:.2f}", f"{row['memory_error']:+.1%}"] if row and "planned_gib" in row else ["", ""]
    return [*memory, f"{row['planned_low']:,.0f}-{row['planned_high']:,.0f}" if row else ""]


def read_report(out: Path, found: dict[str, object]) -> dict:
    """The report at `out`, or a new one. Raises UserError if it is of another machine, or of other versions."""
    if not out.is_file():
        return {"machine": found, "parts": {}}
    report = json.loads(out.read_text(encoding="utf-8"))
    different = [key for key in {**found, **report["machine"]} if report["machine"].get(key) != found.get(key)]
    if different:
        raise UserError(
            f"{out} is of another machine ({', '.join(different)} differ): remove it, or name another file with --out"
        )
    return report


def main() -> int:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=tuple(PARTS), action="append", help="default: all, in order")
    parser.add_argument("--out", type=Path, help="default: artifacts/gpu_proof.json, or artifacts/gpu_rehearsal.json")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of each part (%(default)g)")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on the CPU: tests this script, proves nothing"
    )
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use here; --rehearse runs the parts with tiny sizes on the CPU")
    out = arguments.out or ROOT / "artifacts" / ("gpu_rehearsal.json" if arguments.rehearse else "gpu_proof.json")
    folder = out.resolve().with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    found = machine(arguments.rehearse)
    report = read_report(out, found)
    steps = make_steps(folder, arguments.rehearse, torch.cuda.device_count() if not arguments.rehearse else 0)
    parts = arguments.part or list(PARTS)
    good = [run_part(part, steps, report, out, arguments.minutes) for part in parts]
    print(f"results: {out} and {out.with_suffix('.md')}; files of the steps: {folder}")
    if arguments.rehearse:
        print("this was a rehearsal on the CPU: it tests the script and proves nothing about a GPU")
    return 0 if all(good) else 1


if __name__ == "__main__":
    run_script(main)
