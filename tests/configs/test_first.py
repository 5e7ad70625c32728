"""What is said before torch is imported."""

import pytest

from tests.processes import run_python


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["configs/quickstart.py", "optimizer.lr=1"],
            "error: unknown key optimizer.lr; did you mean optimizer.learning_rate?",
        ),
        (["configs/quickstart.py", "model.name=a"], "error: unknown key model.name; did you mean model.path?"),
        (["run.name=a", "configs/quickstart.py"], "error: run.name=a stands where the config file is expected"),
    ],
)
def test_a_mistake_ends_a_start_before_torch_is_imported(tmp_path, arguments, said) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = run_python("train.py", *arguments, fresh=True, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
