"""The packages of each requirements file: training needs requirements.txt alone, and the other commands ask for theirs."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import xbrl  # noqa: F401 (adds its packages to REQUIREMENTS)
from common.errors import REQUIREMENTS
from tests.processes import run_python
from tests.tiny import write_chat_file, write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "scripts" / "cluster"
BLOCK = f"""
import sys
from importlib.machinery import PathFinder

class Blocked(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {sorted(REQUIREMENTS)!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Blocked
for name in [name for name in sys.modules if name.partition(".")[0] in {sorted(REQUIREMENTS)!r}]:
    del sys.modules[name]  # the warm parent of the tests has scipy
"""
# Runs the commands of its first argument, and prints which package each command of the second asks for.
COMMANDS = f"""{BLOCK}
import json, runpy

sys.path[0] = {str(ROOT)!r}
works, asks = map(json.loads, sys.argv[1:])
for sys.argv in works:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (sys.argv, end.code)
for sys.argv in asks:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except ModuleNotFoundError as error:
        print("asks:", error.name)
"""


@pytest.mark.slow
def test_training_needs_requirements_txt_alone(tmp_path) -> None:
    model = write_tiny_model(tmp_path / "model")
    chats = write_chat_file(tmp_path / "chats.jsonl", 4)
    config = tmp_path / "tiny.py"
    config.write_text(
        f"""
from configs.config import Batch, Config, Data, Model, Optimizer, Run

config = Config(
    model=Model(path={str(model)!r}),
    data=Data(train=({str(chats)!r},), sequence_length=256),
    batch=Batch(global_examples=2),
    optimizer=Optimizer(learning_rate=1e-3, max_steps=1),
    run=Run(directory={str(tmp_path)!r}, name="run"),
)
"""
    )
    program = tmp_path / "program.py"
    program.write_text(COMMANDS)
    run, export = str(tmp_path / "run"), str(tmp_path / "export")
    works = [
        ["scripts/data.py", "show", str(config), "--index", "0"],
        ["scripts/plan.py", str(config)],
        ["train.py", str(config)],
        ["scripts/verify.py", run],
        ["scripts/export.py", run, "--out", export],  # its model card has intervals
        ["scripts/chat.py", export],  # no question on stdin: it loads the model and ends
    ]
    asks = [[f"scripts/{name}.py", "--help"] for name in ("compare", "evaluate", "score")]
    done = run_python(program, json.dumps(works), json.dumps(asks))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "export" / "README.md").is_file()
    assert re.findall("asks: (.*)", done.stdout) == ["scipy", "rouge_score", "rouge_score"]


def test_missing_package_is_asked_for_by_file() -> None:
    program = f"{BLOCK}\nimport runpy\nrunpy.run_path('xbrl/scripts/read_report.py', run_name='__main__')"
    done = run_python("-c", program, fresh=True)
    sentence = "error: this command needs lxml: pip install -r requirements-xbrl.txt -c constraints.txt\n"
    assert (done.returncode, done.stderr) == (2, sentence)


def listed(name: str) -> dict[str, str]:
    """Return (package in lower case -> its versions) of a requirements or constraints file, without the files that it includes."""
    lines = [re.split(r"\s+[#;]", line)[0] for line in (ROOT / name).read_text().splitlines() if line[:1].isalpha()]
    matches = [re.match(r"([\w.-]+)(?:\[[\w,-]+\])?(.*)", line) for line in lines]
    return {match[1].lower().replace("_", "-"): match[2].strip() for match in matches if match}


@pytest.mark.parametrize("name", [path.name for path in sorted(ROOT.glob("requirements*.txt"))])
def test_constraints_pin_a_version_in_every_range(name) -> None:
    pinned = listed("constraints.txt")
    for package, versions in listed(name).items():
        version = pinned[package].removeprefix("==")
        assert SpecifierSet(versions).contains(version), (package, versions, version)


def test_constraints_name_no_host() -> None:
    assert not re.search(r"https?:|--(extra-)?index|find-links", (ROOT / "constraints.txt").read_text())


def test_cluster_scripts_have_valid_syntax() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    for script in (task["setup"], task["run"], (CLUSTER / "train.slurm").read_text()):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    dockerfile = (CLUSTER / "Dockerfile").read_text().replace("\\\n", "")
    instructions = [line.split()[0] for line in dockerfile.splitlines() if line and not line.startswith("#")]
    assert instructions[0] == "FROM" and set(instructions) <= {"FROM", "RUN", "WORKDIR", "COPY", "CMD"}
    copied = re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE)
    assert all((ROOT / name).exists() for names in copied for name in names.split())


def test_launchers_start_two_nodes_as_docs_say() -> None:
    """The options of torchrun that let the nodes meet are the same in both files, and train.py takes the config."""
    for name in ("train.slurm", "skypilot.yaml"):
        text = (CLUSTER / name).read_text().replace("\\\n", "")
        (command,) = re.findall(r"torchrun .*", text)
        for option in (
            "--nnodes=",
            "--nproc_per_node=",
            "--rdzv-backend=c10d",
            '--rdzv-endpoint="$head:29500"',
            "--rdzv-id=",
        ):
            assert option in command
        assert " train.py " in command
