"""The GPU proof without a GPU: its report, its output, and a rehearsal of its speed step."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from tests.gpu import proof
from tests.processes import run_python


def test_without_a_gpu_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_proof"])
    with pytest.raises(UserError, match="there is no GPU that torch can use here"):
        proof.main()


def test_failed_step_sets_the_exit_code(tmp_path, monkeypatch, capsys) -> None:
    def step(output, rehearse: bool, code: str) -> tuple[bool, str]:
        return proof.run([sys.executable, "-c", code], output, rehearse)

    steps = {"good": (step, ("print('fine | well')",)), "bad": (step, ("exit('it broke')",))}
    monkeypatch.setattr(proof, "STEPS", steps)
    command = ["gpu_proof", "--rehearse", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert proof.main() == 1
    assert "FAILS bad: exit code 1: it broke; see " in capsys.readouterr().out
    table = (tmp_path / "report.md").read_text()
    assert "it proves nothing about a GPU" in table and "| good | good | 0 | fine / well |" in table
    assert "| bad | **fails** | " in table and (tmp_path / "bad.txt").read_text() == "it broke\n"
    monkeypatch.setattr(sys, "argv", [*command, "--only", "go"])
    assert proof.main() == 0
    assert "| bad " not in (tmp_path / "go.md").read_text() and (tmp_path / "report.md").read_text() == table


@pytest.mark.slow
def test_a_rehearsal_of_the_speed_step(tmp_path, monkeypatch, capsys) -> None:
    """The programs of the step are forked. The run is not killed before its last step, and ends by itself."""

    def forked(
        command: list, output: Path, rehearse: bool, until: Callable[[], bool] | None = None
    ) -> tuple[bool, str]:
        done = run_python(*command[1:])
        output.write_text(done.stdout + done.stderr)
        assert until is None or until(), output.read_text()
        return done.returncode == 0, done.stdout.strip().splitlines()[-1]

    monkeypatch.setattr(proof, "run", forked)
    monkeypatch.setattr(sys, "argv", ["gpu_proof", "--rehearse", "--only", "speed-12N", "--out", str(tmp_path)])
    code, printed = proof.main(), capsys.readouterr().out
    assert code == 0, printed
    assert "ok    speed-12N: " in printed and " GiB; planned against measured (" in printed
    assert "proves nothing about a GPU" in printed
