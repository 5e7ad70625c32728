"""The steps of the GPU proof: which programs run, with which arguments, and how their results are read."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.ladder import EXTRA, RUNGS

Result = dict[str, object]  # ok: bool; text: what was found, in one line; and the figures
PARTS = {1: "gpu tests", 2: "parity with the CPU", 3: "ladder and planner", 4: "save and resume"}
GPU_TESTS = ("tests/distributed/test_cuda.py", "tests/model/test_equivalence.py")
RESUMES = ("signal", "kill", "asynchronous")


@dataclass(frozen=True)
class Step:
    """One program. `out`: the file it writes, or its standard output if its command does not name one. `read`: reads that."""

    part: int
    name: str
    command: tuple[str, ...]
    out: Path
    read: Callable[[Path], Result]


def make_steps(folder: Path, rehearse: bool, gpus: int) -> list[Step]:
    """All steps in order. folder: for their files. gpus: 0 in a rehearsal."""
    device, size = ("cpu", "tiny") if rehearse else ("cuda", "full")
    steps = []

    def add(part: int, name: str, read: Callable[[Path], Result], suffix: str, *command: object) -> None:
        out = folder / f"{part}-{name.replace('/', '.').replace(' ', '-')}{suffix}"
        words = tuple(str(out) if word is Path else str(word) for word in command)
        steps.append(Step(part, name, (sys.executable, *words), out, read))

    for file in GPU_TESTS:
        options = ("-m", "gpu", "-p", "no:cacheprovider", "-o", "junit_family=xunit2")
        add(
            1,
            file,
            read_tests,
            ".xml",
            "-m",
            "pytest",
            file,
            *options,
            f"--junitxml={folder / '1-'}{file.replace('/', '.')}.xml",
        )
    for what in ("families", "model"):
        add(2, what, read_json, ".json", "-m", "tests.gpu.parity", what, Path, device, size)
    dtype = "fp32" if rehearse else "bf16"
    add(3, "peak", read_peak, ".json", "-m", "bench.peak", device, dtype)
    for key in list(RUNGS | EXTRA) if not rehearse else ["chunked", "12N"]:
        add(3, key, read_rung, ".json", "-m", "bench.ladder", Path, "--rung", key)
    for case in RESUMES:
        add(4, case, read_json, ".json", "-m", "tests.gpu.resume", case, Path, folder / "resume", max(1, gpus), size)
    return steps


def read_json(out: Path) -> Result:
    """What the program wrote: ok, text and its figures."""
    return json.loads(out.read_text(encoding="utf-8"))


def read_tests(out: Path) -> Result:
    """Counts of pytest, and the names of the tests that failed."""
    suite = ElementTree.parse(out).getroot().find("testsuite")
    assert suite is not None
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('name')}: {str(problem.get('message')).splitlines()[0][:200]}"
        for case in suite.iter("testcase")
        for problem in (case.find("failure"), case.find("error"))
        if problem is not None
    ]
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    text = f"{passed} passed, {len(failed)} failed, {count['skipped']} skipped" + "".join(
        f"; {name}" for name in failed
    )
    nothing = torch.cuda.is_available() and not passed  # without a GPU all are skipped, which a rehearsal expects
    return {
        "ok": not failed and not nothing,
        "text": text,
        "passed": passed,
        "failed": failed,
        "skipped": count["skipped"],
    }


def read_peak(out: Path) -> Result:
    """The fastest matrix product, in FLOP/s."""
    flops = json.loads(out.read_text(encoding="utf-8"))
    return {"ok": True, "text": f"{flops / 1e12:.2f} TFLOP/s in the fastest matrix product", "flops": flops}


def read_rung(out: Path) -> Result:
    """Speed and memory of one rung of bench/ladder.py."""
    rung = json.loads(out.read_text(encoding="utf-8"))
    text = f"{rung['tokens_per_second']:,.0f} tokens/s, {rung['memory_gib']:.2f} GiB, loss {rung['loss']:.4f}"
    return {"ok": True, "text": text} | rung
