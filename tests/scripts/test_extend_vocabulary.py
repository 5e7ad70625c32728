"""scripts/extend_vocabulary.py on a tiny model: what it prints, what it writes, what it refuses."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from scripts import extend_vocabulary
from tests.tiny import SENTENCES, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extend")
    write_tiny_model(folder / "model")
    for name, shift in (("corpus", 0), ("held_out", 7000)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(shift, shift + 30):
                text = f"C 03.00 Capital Adequacy\nr0010 c0010 CET1 Capital ratio | {i / 7:.2f}%\n{SENTENCES[i % 2]}"
                file.write(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n")
    return folder


def run(monkeypatch, folder: Path, *arguments: str) -> int:
    command = ["extend_vocabulary.py", str(folder / "model"), "--corpus", str(folder / "corpus.jsonl"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    return extend_vocabulary.main()


def test_it_writes_a_model_and_prints_what_was_gained(folder, monkeypatch, capsys) -> None:
    out = folder / "new"
    options = ("--out", str(out), "--held-out", str(folder / "held_out.jsonl"), "--loss-bytes", "1500")
    assert run(monkeypatch, folder, *options, "--new-tokens", "40") == 0
    said = capsys.readouterr().out
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    listed = json.loads((out / "new_tokens.json").read_text())["tokens"]
    assert len(tokenizer) == 384 + len(listed) == model.config.vocab_size
    assert [tokenizer.decode([384 + i]) for i in range(len(listed))] == [token["text"] for token in listed]
    assert {"r0010", " c0010", "C 03.00"} <= {token["text"] for token in listed}
    # The table, against a count of its own.
    texts = extend_vocabulary.read_texts(folder / "held_out.jsonl")
    base = AutoTokenizer.from_pretrained(folder / "model")
    before, after = (sum(len(t.encode(x, add_special_tokens=False)) for x in texts) / 30 for t in (base, tokenizer))
    row = next(line for line in said.splitlines() if "held_out.jsonl" in line and "%" in line)
    assert row.split()[-4:] == [f"{before:.1f}", f"{after:.1f}", f"{after / before - 1:+.2%}", "30"]
    assert after < 0.6 * before
    rows = {line.split()[0]: [float(x) for x in line.split()[-2:]] for line in said.splitlines() if line[:30].strip() in ("subtokens", "mean", "random")}  # fmt: skip
    assert len(rows) == 3 and all(0 < loss < 20 for row in rows.values() for loss in row)
    assert len({tuple(row) for row in rows.values()}) == 3
    assert not (folder / "new.tmp").exists()
    # Extended again, the new tokens of the first time stay.
    monkeypatch.setattr(sys, "argv", ["x", str(out), "--out", str(folder / "again"), "--corpus", str(folder / "corpus.jsonl"),
                                      "--patterns", r"Capital \w+", "--loss-bytes", "0", "--min-count", "5"])  # fmt: skip
    assert extend_vocabulary.main() == 0
    old, new = (load_file(path / "model.safetensors")["model.embed_tokens.weight"] for path in (out, folder / "again"))
    assert len(new) > len(old) and (new[: len(old)] == old).all()


def test_the_loss_that_is_printed_is_that_of_the_model_that_is_written(folder, monkeypatch, capsys) -> None:
    import torch

    out = folder / "mean"
    run(monkeypatch, folder, "--out", str(out), "--init", "mean", "--loss-bytes", "3000", "--seed", "3")
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mean "))
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    nats = bytes_ = 0
    for text in extend_vocabulary.passages_of(extend_vocabulary.general_text.held_out_texts(), 3000):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            scores = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
        nats -= scores.gather(1, ids[0, 1:, None]).sum().item()
        bytes_ += len(text.encode())
    assert float(printed.split()[1]) == pytest.approx(nats / bytes_, rel=0.02)  # bf16 where the processor has it


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--patterns", "r("), "is no regular expression"),
        (("--patterns", "a*"), "matches the empty text"),
        (("--patterns", "(r)"), "has a group"),
        (("--min-count", "1000"), "lower --min-count"),
        (("--new-tokens", "0"), "--new-tokens must be 1 or more"),
        (("--noise", "-1"), "must not be negative"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(folder, monkeypatch, arguments, sentence) -> None:
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        run(monkeypatch, folder, "--out", str(folder / "refused"), *arguments)
    assert not (folder / "refused").exists() and not (folder / "refused.tmp").exists()
    with pytest.raises(UserError, match="exists; remove it"):
        run(monkeypatch, folder, "--out", str(folder / "model"))
