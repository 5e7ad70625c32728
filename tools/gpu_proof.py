"""Prove the CUDA path on a machine with a GPU: bash scripts/gpu_proof.sh (docs/performance.md)

    tests         the tests that need a GPU, among them losses and gradients against the CPU in fp32 and bf16 (tests/gpu)
    resume        scripts/chaos.py on all GPUs with run.deterministic: ended by signals and kills, equal to the bit
    resume-async  the same with run.async_save=True
    speed-...     a random model of 1B under train.py, 2 x 4,096 tokens a step: speed, MFU and memory, measured and planned

A step that is good is kept in the report, so the same command continues where it was interrupted, and does again what failed.
Results go to a JSON file, and to a table in Markdown beside it, with the card, driver and versions. Exit code 0: all chosen
steps are good; 1: one failed; 2: there is no GPU. --rehearse runs all of it with tiny sizes on the CPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.durable_files import write_json
from common.errors import UserError, run_script
from tools.bench import processor_name, versions
from tools.chaos import write_model
from tools.launched import ROOT, Launch, torchrun

SMOLLM2 = ROOT / "artifacts" / "models" / "SmolLM2-135M-Instruct"
TIMEOUT = 540.0  # seconds of a step
SPEEDS = {
    "speed-plain": (),
    "speed-compile": ("model.compile=True",),
    "speed-checkpointing": ("model.activation_checkpointing=full",),
    "speed-selective": ("model.activation_checkpointing=selective",),
    "speed-offload": ("model.activation_checkpointing=offload",),
    "speed-12N": ("model.activation_checkpointing=full", "optimizer.memory=12N"),
    "speed-8N": ("model.activation_checkpointing=full", "optimizer.memory=8N"),
    "speed-6N": ("model.activation_checkpointing=full", "optimizer.memory=6N"),
}
LLAMA_1B = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LLAMA_1B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}
CONFIG = """\
from configs.config import Batch, Config, Data, Model, Optimizer, Run

config = Config(
    model=Model("{folder}/model"),
    data=Data(("{folder}/train.jsonl",), sequence_length={length}, cache=None),
    batch=Batch(global_examples=2, micro_batch=2),
    optimizer=Optimizer(1e-5, epochs=1, max_steps={steps}),
    run=Run("run", directory="{folder}/runs"),
)
"""


def run(command: list, output: Path, rehearse: bool, until: Callable[[], bool] = lambda: False) -> tuple[bool, str]:
    """Whether a program ended well in time, or got so far, and the last line that it printed. Nothing of it is left."""
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if rehearse else {}
    begin = time.monotonic()
    with Launch(command, output, **environment) as launch:
        while (code := launch.wait(0.2)) is None and not until() and time.monotonic() - begin < TIMEOUT:
            pass
    last = (launch.text().strip().splitlines() or ["it printed nothing"])[-1][:300]
    if code == 0 or until():
        return True, last
    reason = f"not finished in {TIMEOUT:.0f} s" if code is None else f"exit code {code}: {last}"
    return False, f"{reason}; see {output}"


def tests(output: Path, rehearse: bool) -> dict:
    """pytest; a run in which nothing passed is no proof."""
    options = [] if rehearse else ["-m", "gpu", "tests/distributed/test_cuda.py", "tests/model/test_equivalence.py"]
    command = [sys.executable, "-m", "pytest", "-v", "-rf", "-p", "no:cacheprovider", "tests/gpu", *options]
    ok, text = run(command, output, rehearse)
    failed = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("FAILED")]
    return {"ok": ok and " passed" in text, "text": "; ".join([text.strip("= "), *failed])}


def resume(output: Path, rehearse: bool, *options: str) -> dict:
    """scripts/chaos.py on all GPUs, with SmolLM2 if it is here."""
    kills, steps, ranks, settings = 1, 10, 1, ["run.deterministic=True"]
    if not rehearse:
        kills, steps, ranks = 4, 20, torch.cuda.device_count()
        settings += ["model.compute_dtype=bf16", *([f"model.path={SMOLLM2}"] if SMOLLM2.is_dir() else [])]
    size = ["--kills", kills, "--steps", steps, "--ranks", ranks]
    ok, text = run([sys.executable, "scripts/chaos.py", *size, *options, *settings], output, rehearse)
    return {"ok": ok, "text": text}


def speed(output: Path, rehearse: bool, settings: tuple[str, ...]) -> dict:
    """train.py on one device until it has compared its speed and memory with its plan (runs/NAME/plan.json)."""
    folder, name = output.parent / "speed", output.stem
    config, runs, plan = folder / "config.py", folder / "runs", folder / "runs" / name / "plan.json"
    if not config.is_file():
        length, steps = (64, 4) if rehearse else (4096, 60)
        write_model(folder / "model", "bfloat16", **({} if rehearse else LLAMA_1B))
        line = json.dumps({"text": "bank " * (length // 5 - 1)})  # a byte is a token
        (folder / "train.jsonl").write_text(f"{line}\n" * 2 * steps, encoding="utf-8")
        config.write_text(CONFIG.format(folder=folder, length=length, steps=steps), encoding="utf-8")
    shutil.rmtree(runs / name, ignore_errors=True)  # of a try that failed
    ok, text = run(torchrun(1, config, f"run.name={name}", *settings), output, rehearse, plan.is_file)
    if not ok or not plan.is_file():
        return {"ok": False, "text": f"{text}; there is no {plan}"}
    both = json.loads(plan.read_text(encoding="utf-8"))
    rows = map(json.loads, (runs / name / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1])
    mfu = max((row.get("train/mfu") or 0.0 for row in rows), default=0.0)
    found, (low, high) = both["measured"], both["planned"]["tokens_per_second"]
    planned = both["planned"]["memory_bytes"]["peak"] / 2**30
    return both | {
        "ok": True,
        "text": f"{found['tokens_per_second']:,.0f} tokens/s (planned {low:,.0f} to {high:,.0f}), MFU {mfu:.1%} in the best "
        f"step, {found['memory_gib']:.2f} GiB (planned {planned:.2f}, {planned / found['memory_gib'] - 1:+.1%})",
    }


STEPS = {
    "tests": tests,
    "resume": resume,
    "resume-async": lambda output, rehearse: resume(output, rehearse, "--async"),
    **{
        name: lambda output, rehearse, settings=settings: speed(output, rehearse, settings)
        for name, settings in SPEEDS.items()
    },
}


def machine(rehearse: bool) -> dict[str, object]:
    """Card, driver and versions."""
    found: dict[str, object] = {"rehearsal": rehearse, **versions(("torch", "transformers", "torchao"))}
    if rehearse:
        return found | {"card": processor_name("cpu"), "gpus": 0}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    gpu = {"card": torch.cuda.get_device_name(0), "gpus": torch.cuda.device_count()}
    return found | gpu | {"driver": driver, "cuda": torch.version.cuda, "nccl": nccl}


def markdown(report: dict) -> str:
    """The report as a table."""
    found = report["machine"]
    lines = (
        ["**A rehearsal on a CPU with tiny sizes: it proves nothing about a GPU.**", ""] if found["rehearsal"] else []
    )
    lines += [", ".join(f"{key} {value}" for key, value in found.items() if key != "rehearsal"), ""]
    lines += ["| step | result | seconds | found |", "|---|---|---|---|"]
    for name, step in report["steps"].items():
        verdict, text = "good" if step["ok"] else "**fails**", step["text"].replace("|", "/")
        lines.append(f"| {name} | {verdict} | {step['seconds']:.0f} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the chosen steps that are not good yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="NAME", help="only the steps whose names begin so, for example speed"
    )
    parser.add_argument("--out", type=Path, help="default: artifacts/gpu_proof.json, or artifacts/gpu_rehearsal.json")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on the CPU: tests this script, proves nothing"
    )
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use here; --rehearse runs the steps with tiny sizes on the CPU")
    chosen = [name for name in STEPS if name.startswith(arguments.only)]
    if not chosen:
        raise UserError(f"--only {arguments.only!r} names no step; choose from {', '.join(STEPS)}")
    out = arguments.out or ROOT / "artifacts" / ("gpu_rehearsal.json" if arguments.rehearse else "gpu_proof.json")
    folder = out.resolve().with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(arguments.rehearse), "steps": {}}
    if out.is_file():
        kept = json.loads(out.read_text(encoding="utf-8"))
        if kept["machine"] != report["machine"]:
            raise UserError(
                f"{out} is of another machine or other versions: remove it, or name another file with --out"
            )
        report = kept
    for name in chosen:
        if not report["steps"].get(name, {}).get("ok"):
            begin = time.monotonic()
            step = STEPS[name](folder / f"{name}.txt", arguments.rehearse)
            report["steps"][name] = step | {"seconds": time.monotonic() - begin}
            write_json(out, report)
            out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
        print(
            f"{'ok   ' if report['steps'][name]['ok'] else 'FAILS'} {name}: {report['steps'][name]['text']}", flush=True
        )
    print(f"results: {out} and {out.with_suffix('.md')}; output of the steps: {folder}")
    if arguments.rehearse:
        print("this was a rehearsal on the CPU: it tests the script and proves nothing about a GPU")
    return 0 if all(report["steps"][name]["ok"] for name in chosen) else 1


if __name__ == "__main__":
    run_script(main)
