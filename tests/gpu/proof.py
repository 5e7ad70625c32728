"""Prove the CUDA path on a machine with a GPU: bash scripts/gpu_proof.sh (docs/performance.md)

    tests         the tests that need a GPU, among them losses and gradients against the CPU in fp32 and bf16 (tests/gpu)
    resume        scripts/chaos.py on all GPUs with run.deterministic: ended by signals and kills, equal to the bit
    resume-async  the same with run.async_save=True
    speed-...     a random model of 1B under train.py, 2 x 4,096 tokens per step: speed, MFU and memory, measured and planned

Results go to report.md (with --only to NAME.md), a table with the card, driver and versions; what each step printed stands beside
it. Exit code 0: all chosen steps are good; 1: one failed; 2: there is no GPU. --rehearse runs all of it with tiny sizes on the CPU.
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
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError, run_script
from scripts.bench.arms import machine, read_run
from scripts.chaos.launch import ROOT, Launch, torchrun
from tests.distributed.workload import write_workload
from tests.tiny import tiny_tokenizer

SMOLLM2 = ROOT / "artifacts" / "models" / "SmolLM2-135M-Instruct"
TIMEOUT = 540.0  # seconds of a step
LLAMA_1B = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LLAMA_1B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}
TINY = LLAMA_1B | {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = """\
from configs.config import Batch, Config, Data, Model, Optimizer, Run

config = Config(
    model=Model("{folder}/model"),
    data=Data(("{folder}/train.jsonl",), sequence_length={length}, cache=None),
    batch=Batch(global_examples=2, micro_batch=2),
    optimizer=Optimizer(1e-5, epochs=1),
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
    last = (launch.text().strip().splitlines() or ["it printed nothing"])[-1]
    if code == 0 or until():
        return True, last
    reason = f"not finished in {TIMEOUT:.0f} s" if code is None else f"exit code {code}: {last}"
    return False, f"{reason}; see {output}"


def tests(output: Path, rehearse: bool) -> tuple[bool, str]:
    """pytest; a run in which nothing passed is no proof."""
    options = [] if rehearse else ["-m", "gpu", "tests/distributed/test_cuda.py"]
    command = [sys.executable, "-m", "pytest", "-v", "-rf", "-p", "no:cacheprovider", "tests/gpu", *options]
    ok, text = run(command, output, rehearse)
    failed = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("FAILED")]
    return ok and " passed" in text, "; ".join([text.strip("= "), *failed])


def resume(output: Path, rehearse: bool, *settings: str) -> tuple[bool, str]:
    """scripts/chaos.py on all GPUs, with SmolLM2 if it is here."""
    kills, ranks = (1, 1) if rehearse else (4, torch.cuda.device_count())
    folder = output.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    what = [write_workload(folder, 10 if rehearse else 20), "run.deterministic=True", *settings]
    if not rehearse:
        what += ["model.compute_dtype=bf16", *([f"model.path={SMOLLM2}"] if SMOLLM2.is_dir() else [])]
    return run([sys.executable, "scripts/chaos.py", *what, "--kills", kills, "--ranks", ranks], output, rehearse)


def speed(output: Path, rehearse: bool, *settings: str) -> tuple[bool, str]:
    """train.py on one device, killed after some steps, and what plan.py says of them."""
    folder, name, steps = output.parent / "speed", output.stem, 4 if rehearse else 20
    settings += ("model.compute_dtype=fp32",) if rehearse else ()  # many processors are slow in bf16
    config, directory = folder / "config.py", folder / "runs" / name
    if not config.is_file():
        write_speed_run(folder, 64 if rehearse else 4096, steps + 1, TINY if rehearse else LLAMA_1B)
    shutil.rmtree(directory, ignore_errors=True)
    command = torchrun(1, config, f"run.name={name}", *settings)
    ok, text = run(command, output, rehearse, lambda: len(read_run(directory, steps, 1).losses) >= steps)
    found = read_run(directory, steps, 1)
    if not ok or len(found.losses) < steps:
        return False, text
    command = [sys.executable, "scripts/plan.py", config, *settings, "--against", directory]
    ok, text = run(command, output.with_suffix(".plan.txt"), rehearse)
    speed = f"{found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%} in the best step"
    return ok, f"{speed}, {found.memory_gib:.2f} GiB; {text}"


def write_speed_run(folder: Path, length: int, steps: int, shape: dict[str, int]) -> None:
    """Write a random bf16 Llama model, its data and a config to a new folder. Each example has nearly `length` tokens."""
    tokenizer = tiny_tokenizer()
    settings = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "dtype": "bfloat16"}
    model = AutoConfig.for_model("llama", **shape, **settings, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(model, dtype=torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = json.dumps({"text": "0" * (length - 4)})  # each digit is a token
    (folder / "train.jsonl").write_text(f"{text}\n" * 2 * steps, encoding="utf-8")
    (folder / "config.py").write_text(CONFIG.format(folder=folder, length=length), encoding="utf-8")


STEPS: dict[str, tuple[Callable[..., tuple[bool, str]], tuple[str, ...]]] = {
    "tests": (tests, ()),
    "resume": (resume, ()),
    "resume-async": (resume, ("run.async_save=True",)),
    "speed-plain": (speed, ()),
    "speed-compile": (speed, ("model.compile=True",)),
    "speed-checkpointing": (speed, ("model.activation_checkpointing=full",)),
    "speed-selective": (speed, ("model.activation_checkpointing=selective",)),
    "speed-offload": (speed, ("model.activation_checkpointing=offload",)),
    "speed-12N": (speed, ("model.activation_checkpointing=full", "optimizer.memory=12N")),
    "speed-8N": (speed, ("model.activation_checkpointing=full", "optimizer.memory=8N")),
    "speed-6N": (speed, ("model.activation_checkpointing=full", "optimizer.memory=6N")),
}


def about_machine() -> str:
    """Card, versions and driver."""
    words = machine(("torch", "transformers", "torchao"))
    if not torch.cuda.is_available():
        return words
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{torch.cuda.device_count()} x {words}, CUDA {torch.version.cuda}, NCCL {nccl}, driver {driver}"


def main() -> int:
    """Run the chosen steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", default="", metavar="NAME", help="only the steps whose names begin so, for example speed")
    add("--out", type=Path, metavar="DIR", help="(default: artifacts/gpu_proof, or artifacts/gpu_rehearsal)")
    add("--rehearse", action="store_true", help="tiny sizes on the CPU: tests this script, proves nothing")
    arguments = parser.parse_args()
    rehearse = arguments.rehearse
    if not rehearse and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use here; --rehearse runs the steps with tiny sizes on the CPU")
    chosen = {name: step for name, step in STEPS.items() if name.startswith(arguments.only)}
    if not chosen:
        raise UserError(f"--only {arguments.only!r} names no step; choose from {', '.join(STEPS)}")
    folder = (arguments.out or ROOT / "artifacts" / ("gpu_rehearsal" if rehearse else "gpu_proof")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    passed, report = True, folder / f"{arguments.only or 'report'}.md"
    lines = ["**A rehearsal on a CPU with tiny sizes: it proves nothing about a GPU.**", ""] if rehearse else []
    lines += [about_machine(), "", "| step | result | seconds | found |", "|---|---|---|---|"]
    for name, (step, settings) in chosen.items():
        begin = time.monotonic()
        ok, text = step(folder / f"{name}.txt", rehearse, *settings)
        passed &= ok
        seconds, text = time.monotonic() - begin, text.replace("|", "/")
        lines.append(f"| {name} | {'good' if ok else '**fails**'} | {seconds:.0f} | {text} |")
        report.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{'ok   ' if ok else 'FAILS'} {name}: {text}", flush=True)
    print(f"results: {report}; output of the steps beside it")
    if rehearse:
        print("this was a rehearsal on the CPU: it tests the script and proves nothing about a GPU")
    return 0 if passed else 1


if __name__ == "__main__":
    run_script(main)
