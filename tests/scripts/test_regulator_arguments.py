"""scripts/score.py and scripts/regulator.py: a mistake in the arguments is one sentence and exit code 2."""

import json

import pytest

from tests.processes import run_python

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["scripts/regulator.py", "law"],
            "data.jsonl: an example has no violations; name files of scripts/make_reports.py",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, arguments, sentence):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(CHAT) + "\n")
    run = run_python(*arguments, "--data", data)
    assert run.returncode == 2 and sentence in run.stderr and run.stderr.count("\n") == 1
