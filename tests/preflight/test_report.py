"""The report of a check: one line for each result, exit code, JSON; and the sentences about children that have failed."""

import json
import os
import signal
import sys

import pytest

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from configs.loading.command_line import Command
from preflight.launch import Job, _problem, _State, child_environment, last_words, start_process
from preflight.report import exit_code, lines, write_report
from preflight.result import FAILS, OK, SKIPPED, WARNING, Result
from preflight.start import check_inputs
from tests.tiny import write_chat_file, write_tiny_model

RESULTS = [
    Result("machine", "disk", OK, "room"),
    Result("data", "EOS", FAILS, "no end\nsecond line", {"examples": 3, "lines": ["shown"]}),
    Result("run", "loss", SKIPPED, "no reference"),
]


def test_lines_stand_in_the_order_of_the_groups_and_the_last_one_counts() -> None:
    assert lines(RESULTS, 61.4) == [
        "fails    data       EOS   no end",
        "                          second line",
        "                          shown",
        "skipped  run        loss  no reference",
        "ok       machine    disk  room",
        "3 checks in 61 s: 1 ok, 0 warning, 1 fails, 1 skipped; do not start this run before what fails is mended",
    ]
    assert exit_code(RESULTS) == 1
    assert exit_code(RESULTS[:1] + [Result("run", "loss", WARNING, "")]) == 0


def test_the_json_has_all_figures_and_what_produced_them(tmp_path) -> None:
    write_report(tmp_path / "new" / "report.json", RESULTS, ("config.py", "a.b=1"), 4, 61.44)
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["results"][1] == vars(RESULTS[1])
    assert (report["command"], report["seconds"], report["exit_code"]) == (["config.py", "a.b=1"], 61.4, 1)
    assert report["machine"]["ranks"] == 4 and "torch" in report["versions"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="name a file that can be written"):
        write_report(tmp_path / "file" / "report.json", RESULTS, (), 1, 1.0)


@pytest.mark.parametrize(
    "output, words",
    [
        ("step 1\nerror: no such file; do this\nstep 2\n", "no such file; do this"),
        (
            "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA\nlater\n",
            "torch.OutOfMemoryError: CUDA",
        ),
        ("step 1\rstep 2\n\n", "step 2"),
        ("", ""),
    ],
)
def test_the_last_words_of_a_child(tmp_path, output, words) -> None:
    (tmp_path / "output").write_text(output)
    assert last_words(tmp_path / "output") == words


def test_the_sentence_is_that_of_the_rank_that_failed_first() -> None:
    job = Job("straight", ("train.py",), 3, 60.0)
    words = [("a", "lost rank 1"), ("b", "ValueError: x"), ("b", "lost rank 1")]
    assert _problem(job, [_State(3), _State(1), _State(3)], words, False) == "rank 1 on host b: ValueError: x"
    words = [("a", "rank 1 differs"), ("b", "rank 1 differs"), ("b", "x")]
    assert _problem(job, [_State(2), _State(2), _State(-9)], words, False) == "rank 1 differs"
    killed = _problem(job, [_State(3), _State(3), _State(-9)], words, False)
    assert killed.startswith("rank 2 on host b: killed by SIGKILL, which the kernel sends when memory runs out")
    late = _problem(job, [_State(None, True), _State(0), _State(0)], words, True)
    assert late == "did not end within 1 minute; the last line of rank 0: rank 1 differs"


def test_a_child_gets_its_rank_the_store_of_the_launcher_and_nothing_else_of_torchrun(tmp_path, monkeypatch) -> None:
    launcher = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    torchrun = {"MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "3", "PET_NNODES": "2"}
    for name, value in (launcher | torchrun).items():
        monkeypatch.setenv(name, value)
    found = child_environment(Job("fewer", (), 4, 1.0), tmp_path)
    assert {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")} == {
        "RANK": "5",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert found["TORCHELASTIC_RESTART_COUNT"] == "0" and found["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    assert not {"TORCHELASTIC_RUN_ID", "PET_NNODES"} & found.keys()
    assert "PYTHONSAFEPATH" not in found  # an edited train.py may have modules beside it
    alone = child_environment(Job("probe", ("-m", "preflight.probe"), 0, 1.0), tmp_path)
    assert alone["PYTHONSAFEPATH"] == "1"  # a re.py in the user's directory is not a library
    assert not {*launcher, "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"} & alone.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_child_has_a_group_of_its_own_and_dies_with_its_parent(tmp_path) -> None:
    """A parent in between starts a child that would live for a minute, and is killed."""
    out = tmp_path / "child"
    parent = os.fork()
    if parent == 0:
        code = "import os, signal, sys; print(os.getpid(), os.getpgid(0), flush=True); signal.sigtimedwait([], 60)"
        start_process(["-c", code], dict(os.environ), out)
        signal.pause()
    try:
        while not (out.exists() and out.read_text().endswith("\n")):
            assert os.waitpid(parent, os.WNOHANG) == (0, 0)
        pid, group = map(int, out.read_text().split())
        assert pid == group != os.getpgid(0)
        descriptor = os.pidfd_open(pid)
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    import select

    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    assert poller.poll(20_000), "the child outlives its parent"


def test_more_layers_than_the_model_has_are_refused(tmp_path) -> None:
    write_tiny_model(tmp_path / "model", layers=2)
    write_chat_file(tmp_path / "train.jsonl", 4)
    config = Config(
        Model(str(tmp_path / "model")),
        Data((str(tmp_path / "train.jsonl"),)),
        Batch(global_examples=4),
        Optimizer(1e-3),
        Run("r"),
    )
    check_inputs(Command(config, (), check=True, layers=1), 1)
    with pytest.raises(UserError, match="--layers 2: the model has 2 layers"):
        check_inputs(Command(config, (), check=True, layers=2), 1)
