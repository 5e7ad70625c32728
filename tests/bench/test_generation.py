"""The comparison of greedy answers with transformers' generate."""

import json

import pytest

from bench.generation import agreement, measure, table, until_stop
from bench.tokenization import Times
from tests.processes import run_python
from tests.tiny import write_chat_file, write_tiny_model


def test_answers_are_compared_up_to_the_first_difference():
    assert until_stop([5, 6, 2, 7], [2]) == [5, 6] and until_stop([5], [2]) == [5] and until_stop([2], [2]) == []
    same, share = agreement([[1, 2, 3], [4, 9], [5], []], [[1, 2, 3], [4, 5, 6], [5, 7], []])
    assert (same, share) == (2, pytest.approx((3 + 1 + 1) / 8))


def test_an_arm_that_fails_is_a_line_with_its_reason():
    calls = []

    def good(prompts):
        calls.append(len(prompts))
        return [[1, 2]] * len(prompts)

    def bad(prompts):
        raise ValueError("no CPU\nsecond line")

    seconds, answers = measure({"ours": good, "continuous": bad, "static": good}, [[3]] * 5, rounds=2)
    assert calls == [2, 2, 5, 5, 5, 5] and list(map(len, seconds.values())) == [2, 0, 2]
    times = {"ours": [Times(1, 4), Times(2, 3), Times(3, 4)], "static": [Times(5, 10)], "continuous": []}
    lines = table(times, answers)
    assert lines[1].split()[:5] == ["ours", "2.0", "100.0%", "4.0", "10"]
    assert "2.50x     2.50x  5 of 5; 100.0% of the tokens" in lines[3]
    assert lines[2] == "continuous  ValueError: no CPU"


def test_static_batches_give_our_answers(tmp_path):
    write_tiny_model(tmp_path / "model", seed=3)
    write_chat_file(tmp_path / "test.jsonl", 7)
    arguments = [tmp_path / "model", "--data", tmp_path / "test.jsonl", "--dtype", "fp32", "--max-new-tokens", 9]
    arguments += ["--arms", "ours,static", "--rounds", 1, "--batch-size", 3, "--json", tmp_path / "result.json"]
    done = run_python("-m", "bench.generation", *arguments, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "7 of 7; 100.0% of the tokens before the first difference" in done.stdout.splitlines()[-1]
    answers = json.loads((tmp_path / "result.json").read_text())["answers"]
    assert answers["ours"] == answers["static"] and max(map(len, answers["ours"])) == 9
