"""scripts/chat.py: each model answers in the conversation that it has had itself."""

import pytest
import torch

from eval.chat import Speaker, talk
from eval.generate import Sampling
from tests.processes import ROOT, run_python
from tests.tiny import write_tiny_model

# Starts a script whose standard input is what a user types.
TYPED = """
import io, runpy, sys
sys.argv = sys.argv[1:]
sys.stdin = io.TextIOWrapper(io.BytesIO(b"\\xef\\xbb\\xbfhello\\n/new\\nhello\\n"), encoding="utf-8")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    for name in ("base", "tuned"):
        write_tiny_model(folder / name)
    return [str(folder / "base"), str(folder / "tuned")]


def begin(models):
    return Speaker(models[0], "You are brief.", torch.float32, torch.device("cpu"))


def test_a_conversation_continues_and_restarts(models):
    speaker = begin(models)
    first = speaker.answer("one", 8, None)
    assert [message["role"] for message in speaker.messages] == ["system", "user", "assistant"]
    speaker.answer("two", 8, None)
    # What the model sees is what training would make of the same chat.
    prompt = speaker.encoder.prompt([*speaker.messages, {"role": "user", "content": "three"}])
    assert len(prompt) > len(speaker.encoder.prompt(speaker.messages[:2]))
    speaker.begin_again()
    assert speaker.answer("one", 8, None) == first  # greedy, and nothing of the earlier questions is left


def test_samples_differ_by_turn_and_repeat(models):
    sampling = Sampling(temperature=1.0, seed=3)
    first, second = ([one.answer("one", 16, sampling) for _ in range(2)] for one in (begin(models), begin(models)))
    assert first == second and first[0] != first[1]


def test_a_long_question_is_an_error(models):
    speaker, said = begin(models), list[str]()
    talk([speaker], ["hello " * 2000, "", "hello", "/quit", "never asked"], 4, None, said.append)
    assert "error: the conversation has" in said[0] and "begin again with /new" in said[0]
    assert [message["content"] for message in speaker.messages if message["role"] == "user"] == ["hello"]


def test_the_script_answers_side_by_side(models, tmp_path):
    (tmp_path / "typed.py").write_text(TYPED)
    command = (ROOT / "scripts" / "chat.py", *models, "--max-new-tokens", "4", "--dtype", "fp32")
    done = run_python(tmp_path / "typed.py", *command)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert [line.split(" | ")[0].strip() for line in lines if line.startswith("/")] == models * 2
    answers = [line.split(" | ", 1)[1] for line in lines if line.startswith("/")]
    # /new began again, and the byte order mark is no part of the first question.
    assert answers[:2] == answers[2:]


def test_a_question_must_be_text(models, tmp_path):
    (tmp_path / "typed.py").write_text(TYPED.replace("hello\\n/new", "caf\\xe9\\n/new"))
    done = run_python(tmp_path / "typed.py", ROOT / "scripts" / "chat.py", models[0], "--dtype", "fp32")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: a question is not UTF-8 text")
