import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from data.tokens import encode_chat, encode_document, load_tokenizer
from tests.tiny import write_chat_file, write_tiny_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.py"
BREACH = "Violations:\nLCR_MIN | LCR | 75.2% | min 100% | CRR Art. 412(1)\nDirective:\nThe bank shall restore its LCR."
CLEAN = "Violations:\nnone\nDirective:\nNo measures."


def chat(name, question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages}


EXAMPLES = [
    chat("a", "LCR 75.2% of the bank", BREACH),
    chat("b", "LCR 120%", CLEAN),
    {"text": "The liquidity coverage ratio of the bank."},
    chat("c", "CET1 ratio 13% and then a much longer report of the bank, with total exposure and more.", CLEAN),
    chat("d", "Leverage ratio 2.1%", BREACH.replace("LCR_MIN", "LR_MIN")),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_tiny_model(folder / "model")
    (folder / "test.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    (folder / "train.jsonl").write_text(json.dumps(EXAMPLES[0]) + "\n" + json.dumps(EXAMPLES[1]) + "\n")
    return folder


@pytest.fixture
def evaluate(monkeypatch, files):
    """The script in this process, as plain `python scripts/evaluate.py`; returns its JSON."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("evaluate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(model, data, *options):
        arguments = [str(model), "--data", str(data), "--json", str(files / "out" / "plain.json"), *map(str, options)]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        assert module.main() == 0
        return json.loads((files / "out" / "plain.json").read_text())

    yield call
    torch.set_num_threads(threads)


def expected_loss(directory):
    """By the definition: one example at a time, every target token weighing the same."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), load_tokenizer(directory)
    nats, targets = 0.0, 0
    for example in EXAMPLES:
        encode = encode_chat(tokenizer, example["messages"]) if "messages" in example else None
        ids, is_target = encode or encode_document(tokenizer, example["text"])
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for t in range(1, len(ids)):
            if is_target[t]:
                nats, targets = nats - log_p[t - 1, ids[t]].item(), targets + 1
    return nats / targets, targets


def test_alone_and_on_two_processes_the_figures_are_the_same(evaluate, files, capsys):
    options = ["--train", files / "train.jsonl", "--max-new-tokens", 12, "--dtype", "fp32", "--general"]
    alone = evaluate(files / "model", files / "test.jsonl", *options)
    printed = capsys.readouterr().out
    assert "violations F1 (micro)" in printed
    assert "answer to example a (true violations: LCR_MIN)" in printed

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    command = [*torchrun, files / "model", "--data", files / "test.jsonl", *options, "--json", files / "two.json"]
    command += ["--before", files / "out" / "plain.json", "--batch-size", 2]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("answer to example") == 1  # rank 0 alone prints
    assert "before" in done.stdout
    two = json.loads((files / "two.json").read_text())

    assert (alone["processes"], two["processes"]) == (1, 2)
    loss, targets = expected_loss(files / "model")
    for result in (alone, two):
        assert result["loss"] == {"mean": pytest.approx(loss, abs=1e-5), "targets": targets}
        assert [answer["id"] for answer in result["answers"]] == ["a", "b", "c", "d"]
        assert result["general"]["perplexity"] == pytest.approx(alone["general"]["perplexity"], rel=1e-5)
        assert result["n_examples"] == 5
        assert result["violations"]["n_reports"] == 4
        assert result["violations"]["baselines_fitted_on"] == "2 training examples"
    assert two["answers"] == alone["answers"]
    assert two["violations"] == alone["violations"]
    assert len({answer["answer"] for answer in alone["answers"]}) > 1
    general = alone["general"]
    nats = general["tokens"] * math.log(general["perplexity"])
    assert general["perplexity_per_byte"] == pytest.approx(math.exp(nats / general["bytes"]))
    assert general["tokens"] < general["bytes"]


def test_answers_may_be_as_long_as_the_longest_true_one_and_16(evaluate, files):
    tokenizer = load_tokenizer(files / "model")
    longest = max(sum(encode_chat(tokenizer, e["messages"])[1]) for e in EXAMPLES if "messages" in e)
    result = evaluate(files / "model", files / "test.jsonl", "--show", 0)
    # The template writes a newline behind the end of the answer.
    assert result["max_new_tokens"] == longest + 1 + 16


def test_limit_is_a_fixed_choice_in_file_order(evaluate, files, tmp_path):
    data = write_chat_file(tmp_path / "chat.jsonl", 40)
    options = ("--limit", 6, "--max-new-tokens", 2)
    ids = [answer["id"] for answer in evaluate(files / "model", data, *options)["answers"]]
    numbers = [int(name.removeprefix("example-")) for name in ids]
    assert len(numbers) == 6
    assert numbers == sorted(numbers) != list(range(6))
    assert [answer["id"] for answer in evaluate(files / "model", data, *options)["answers"]] == ids


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--limit", 0], "--limit must be 1 or more"),
        (["--max-new-tokens", 5000], "positions"),
        (["--before", "nothing.json"], "nothing.json is not the JSON of an evaluation"),
        (["--train", "nothing.jsonl"], "nothing.jsonl does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_starts(evaluate, files, options, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(files / "model", files / "test.jsonl", *options)
    assert not torch.distributed.is_initialized()


def test_what_cannot_be_read_or_written_is_said_before_the_work(evaluate, files):
    config = files / "model" / "config.json"  # JSON, but no result
    with pytest.raises(UserError, match="is not the JSON of an evaluation"):
        evaluate(files / "model", files / "test.jsonl", "--before", config)
    with pytest.raises(UserError, match="x.json cannot be written: .*; choose another file"):
        evaluate(files / "model", files / "test.jsonl", "--json", files / "test.jsonl" / "x.json")
    with pytest.raises(UserError, match="it is a folder"):
        evaluate(files / "model", files / "test.jsonl", "--json", files / "model")
    assert not torch.distributed.is_initialized()


def test_other_data_is_refused_before_anything_starts(evaluate, files, tmp_path):
    evaluate(files / "model", files / "test.jsonl", "--limit", 2, "--max-new-tokens", 2)
    before = files / "out" / "plain.json"
    with pytest.raises(UserError, match="n_examples differs"):
        evaluate(files / "model", files / "test.jsonl", "--max-new-tokens", 2, "--before", before)
    assert not torch.distributed.is_initialized()


def test_what_is_no_model_directory_is_said(evaluate, files):
    with pytest.raises(UserError, match="not a model directory"):
        evaluate(files, files / "test.jsonl")
