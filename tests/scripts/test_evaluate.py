"""scripts/evaluate.py on one and on two processes, compared with the definition of the loss."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.durable_files import write_json_lines
from data.tokens import load_tokenizer
from tests.processes import run_python, run_ranks
from tests.tiny import encode_one, write_tiny_model

EVALUATE, SCORE = "scripts/evaluate.py", "scripts/score.py"
TASK = ("--task", "xbrl.task")
FIELDS = ("--fields", "messages=talk")
BREACH = "Violations:\nLCR_MIN | LCR | 75.2% | min 100% | CRR Art. 412(1)\nDirective:\nThe bank shall restore its LCR."
CLEAN = "Violations:\nnone\nDirective:\nNo measures."


def chat(name, question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages}


EXAMPLES = [
    chat("a", "LCR 75.2% of the bank", BREACH),
    chat("b", "LCR 120%", CLEAN),
    {"text": "The liquidity coverage ratio of the bank."},
    chat("c", "CET1 ratio 13% and then a much longer report of the bank, with total exposure.<|im_end|>", CLEAN),
    chat("d", "Leverage ratio 2.1%", BREACH.replace("LCR_MIN", "LR_MIN")),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_tiny_model(folder / "model")
    write_json_lines(folder / "test.jsonl", EXAMPLES)
    write_json_lines(folder / "train.jsonl", EXAMPLES[:2])
    own = [{"talk" if key == "messages" else key: value for key, value in row.items()} for row in EXAMPLES]
    write_json_lines(folder / "own.jsonl", own)
    return folder


def expected_loss(directory):
    """Compute the loss by its definition: one example at a time, with the same weight for every target token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), load_tokenizer(directory)
    nats, targets = 0.0, 0
    for example in EXAMPLES:
        ids, is_target = encode_one(tokenizer, example)
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for t in range(1, len(ids)):
            if is_target[t]:
                nats, targets = nats - log_p[t - 1, ids[t]].item(), targets + 1
    return nats / targets, targets


def test_one_and_two_processes_give_the_same_metrics(files):
    model_and_data = [files / "model", "--data", files / "test.jsonl", *TASK]
    options = ["--train", files / "train.jsonl", "--max-new-tokens", 12, "--dtype", "fp32", "--shots", 1]
    done = run_python(EVALUATE, *model_and_data, *options, "--json", files / "out" / "one.json")
    assert done.returncode == 0, done.stderr
    assert "violations F1 (micro)" in done.stdout
    assert "answer to example a (true: LCR_MIN)" in done.stdout
    one = json.loads((files / "out" / "one.json").read_text())

    compared = ["--json", files / "two.json", "--before", files / "out" / "one.json", "--batch-size", 2]
    compared += ["--sharding", "full", "--answers", files / "answers.jsonl"]
    done = run_ranks(2, EVALUATE, *model_and_data, *options, *compared)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("answer to example") == 1  # only rank 0 prints
    # Written to a file, a progress bar takes few lines, and it ends at 100% although answers end early.
    bars = set(re.findall(r"([\w ]+) \(rank 0 of 2\): 100% after", done.stderr))
    assert bars == {"loss of the responses", "answers"} and done.stderr.count("% after") <= 4
    assert done.stdout.count("control tokens: 1 example has") == 1
    assert f"data.control_tokens=allow: {files / 'test.jsonl'}, line 4\n" in done.stdout
    assert "before" in done.stdout
    two = json.loads((files / "two.json").read_text())

    assert (one["processes"], two["processes"]) == (1, 2)
    assert (one["sharding"], two["sharding"]) == ("none", "full")
    loss, targets = expected_loss(files / "model")
    for result in (one, two):
        assert result["loss"] == {"mean": pytest.approx(loss, abs=1e-5), "targets": targets}
        assert [answer["id"] for answer in result["answers"]] == ["a", "b", "c", "d"]
        assert result["n_examples"] == 5
        assert result["violations"]["n_reports"] == 4
        assert result["violations"]["baselines_fitted_on"] == "2 training examples"
    assert two["answers"] == one["answers"]
    assert two["violations"] == one["violations"]
    same_answers_scored_without_the_model(files, two)
    assert len({answer["answer"] for answer in one["answers"]}) > 1


def same_answers_scored_without_the_model(files, result):
    """Check that scripts/score.py gives the scores of scripts/evaluate.py, except for the loss."""
    arguments = ["--data", files / "test.jsonl", "--train", files / "train.jsonl", "--answers", files / "answers.jsonl"]
    arguments += [*TASK, "--json", files / "scored.json", "--before", files / "out" / "one.json"]
    done = run_python(SCORE, *arguments)
    assert done.returncode == 0, done.stderr
    scored = json.loads((files / "scored.json").read_text())
    parts = ("violations", "facts", "rouge_l", "answers", "data_sha256", "n_examples")
    assert {part: scored[part] for part in parts} == {part: result[part] for part in parts}
    assert "answer to example a" in done.stdout and "before" in done.stdout
    (files / "answers.jsonl").write_text("")
    done = run_python(SCORE, "--data", files / "own.jsonl", "--answers", files / "answers.jsonl", *FIELDS)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(
        f"error: {files / 'answers.jsonl'}: the answer to a (and 3 more) of {files / 'own.jsonl'}"
    )


def test_answers_are_kept_if_the_metric_fails(files):
    options = ["--data", files / "test.jsonl", "--limit", 2, "--max-new-tokens", 4, "--answers", files / "kept.jsonl"]
    done = run_python(EVALUATE, files / "model", *options, "--metric", "json:loads")
    assert done.returncode == 2 and "error: eval.metric=json:loads fails" in done.stderr
    assert len((files / "kept.jsonl").read_text().splitlines()) == 2


def test_large_model_is_sharded_and_chats_scored(files):
    """The keys of the messages are named with --fields."""
    with (files / "model" / "large.safetensors").open("wb") as file:  # only its size matters; it takes no disk
        file.truncate(2**31)
    arguments = [EVALUATE, files / "model", "--data", files / "own.jsonl", "--max-new-tokens", 8, *FIELDS]
    done = run_ranks(2, *arguments, "--limit", 3, "--json", files / "own.json")
    (files / "model" / "large.safetensors").unlink()
    assert done.returncode == 0, done.stderr
    result = json.loads((files / "own.json").read_text())
    assert result["exact_match"]["n"] == len(result["answers"]) > 0 and result["task"] == ""
    assert "\nexact match " in done.stdout and "violations" not in done.stdout
    message = "--sharding full: each of 2 processes holds a part of the 2.0 GiB; --sharding none is"
    assert done.stdout.count(message) == 1


def test_mistake_on_rank_0_is_one_line(files):
    write_json_lines(files / "odd.jsonl", [EXAMPLES[0] | {"violations": "LCR_MIN"}])
    done = run_ranks(2, EVALUATE, files / "model", "--data", files / "odd.jsonl", *TASK)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = "odd.jsonl, example a: `violations` must be a list of ids of rules, not 'LCR_MIN'"
    assert done.stderr.count("error: ") == done.stderr.count(message) == 1
