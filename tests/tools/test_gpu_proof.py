"""The GPU proof without a GPU: what it keeps and prints, and a rehearsal of its speed step."""

import json
import sys

import pytest
import torch

from common.errors import UserError
from tests.processes import run_python
from tools import gpu_proof


def test_without_a_gpu_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_proof"])
    with pytest.raises(UserError, match="there is no GPU that torch can use here"):
        gpu_proof.main()


def test_good_steps_are_kept_and_failed_ones_are_done_again(tmp_path, monkeypatch, capsys) -> None:
    """Two programs: one always works, one works from its second run on."""
    ran, out = [], tmp_path / "proof.json"

    def step(name: str, code: str):
        def run(output, rehearse: bool) -> dict:
            ran.append(name)
            ok, text = gpu_proof.run([sys.executable, "-c", code], output, rehearse)
            return {"ok": ok, "text": text}

        return run

    shaky = f"import os; p = {str(tmp_path / 'x')!r}; os.path.exists(p) or (open(p, 'w'), exit('it broke')); print('mended')"
    steps = {"good": step("good", "print('fine')"), "shaky": step("shaky", shaky)}
    monkeypatch.setattr(gpu_proof, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["gpu_proof", "--rehearse", "--out", str(out)])
    assert gpu_proof.main() == 1
    assert "FAILS shaky: exit code 1: it broke; see " in capsys.readouterr().out
    assert gpu_proof.main() == 0
    assert ran == ["good", "shaky", "shaky"]
    table = out.with_suffix(".md").read_text()
    assert "it proves nothing about a GPU" in table and "| shaky | good | " in table and "| mended |" in table
    monkeypatch.setattr(gpu_proof, "versions", lambda packages: {"torch": "1.0"})
    with pytest.raises(UserError, match="is of another machine or other versions"):
        gpu_proof.main()


@pytest.mark.slow
def test_a_rehearsal_of_the_speed_step(tmp_path) -> None:
    out = tmp_path / "proof.json"
    done = run_python("-m", "tools.gpu_proof", "--rehearse", "--only", "speed-12N", "--out", out, fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    step = json.loads(out.read_text())["steps"]["speed-12N"]
    assert step["measured"]["tokens_per_second"] > 0 and step["planned"]["memory_bytes"]["peak"] > 0
    assert "ok    speed-12N: " in done.stdout and " GiB (planned " in done.stdout
    assert "proves nothing about a GPU" in done.stdout
