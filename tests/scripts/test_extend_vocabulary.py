"""The command scripts/extend_vocabulary.py on a tiny model: its output, the new model directory, and errors."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import general_text
from eval.vocabulary import read_texts, select_passages
from tests.processes import run_python
from tests.tiny import SENTENCES, write_tiny_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "extend_vocabulary.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a model, a corpus, and a held-out file with the same labels but other figures."""
    folder = tmp_path_factory.mktemp("extend")
    write_tiny_model(folder / "model")
    for name, shift in (("corpus", 0), ("held_out", 7000)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(shift, shift + 30):
                text = f"C 03.00 Capital Adequacy\nr0010 c0010 CET1 Capital ratio | {i / 7:.2f}%\n{SENTENCES[i % 2]}"
                file.write(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n")
    return folder


def run(folder: Path, *arguments: str, model: str = "model") -> subprocess.CompletedProcess:
    return run_python(SCRIPT, model, "--corpus", "corpus.jsonl", *arguments, cwd=folder)


def run_successfully(folder: Path, *arguments: str, model: str = "model") -> str:
    done = run(folder, *arguments, model=model)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def output(folder) -> str:
    """Extend the vocabulary with the default initialisation. Return the output."""
    options = ("--task", "xbrl.task", "--held-out", "held_out.jsonl", "--loss-bytes", "1500", "--new-tokens", "40")
    return run_successfully(folder, "--out", "new", *options)


def test_model_is_written_and_the_effect_is_printed(folder, output) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "new")
    model = AutoModelForCausalLM.from_pretrained(folder / "new")
    record = json.loads((folder / "new" / "new_tokens.json").read_text())
    listed = record.pop("tokens")
    assert record == {"base": "model", "first_id": 384, "init": "subtokens", "noise": 0.1, "seed": 0}
    assert len(tokenizer) == 384 + len(listed) == model.config.vocab_size
    assert [tokenizer.decode([384 + i]) for i in range(len(listed))] == [token["text"] for token in listed]
    assert {"r0010", " c0010", "C 03.00"} <= {token["text"] for token in listed}
    # The printed table against a separate count.
    texts = read_texts(folder / "held_out.jsonl")
    base = AutoTokenizer.from_pretrained(folder / "model")
    before, after = (sum(len(t.encode(x, add_special_tokens=False)) for x in texts) / 30 for t in (base, tokenizer))
    row = next(line for line in output.splitlines() if "held_out.jsonl" in line and "%" in line)
    assert row.split()[-4:] == [f"{before:.1f}", f"{after:.1f}", f"{after / before - 1:+.2%}", "30"]
    assert after < 0.6 * before
    losses = {
        line.split()[0]: [float(x) for x in line.split()[-2:]]
        for line in output.splitlines()
        if line[:30].strip() in ("subtokens", "mean", "random")
    }
    assert len(losses) == 3 and all(0 < loss < 20 for row in losses.values() for loss in row)
    assert len({tuple(row) for row in losses.values()}) == 3
    assert not (folder / "new.tmp").exists()


def test_extended_model_can_be_extended_again(folder, output) -> None:
    options = ("--patterns", r"Capital \w+", "--loss-bytes", "0", "--min-count", "5")
    run_successfully(folder, "--out", "again", *options, model="new")
    paths = (folder / "new", folder / "again")
    old, new = (load_file(path / "model.safetensors")["model.embed_tokens.weight"] for path in paths)
    assert len(new) > len(old) and (new[: len(old)] == old).all()


def test_passages_have_the_requested_bytes() -> None:
    for size, expected in ((100, 40_000), (3000, 60_000), (50_000, 60_000)):
        passages = select_passages(["x" * size] * 400, 60_000)
        assert sum(map(len, passages)) == expected and max(map(len, passages)) == min(size, 6000)


def test_printed_loss_is_that_of_the_written_model(folder) -> None:
    printed = run_successfully(folder, "--out", "mean", "--init", "mean", "--loss-bytes", "3000", "--seed", "3")
    row = next(line for line in printed.splitlines() if line.startswith("mean "))
    model = AutoModelForCausalLM.from_pretrained(folder / "mean")
    tokenizer = AutoTokenizer.from_pretrained(folder / "mean")
    nats = num_bytes = 0
    for text in select_passages(general_text.held_out_texts(), 3000):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            scores = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
        nats -= scores.gather(1, ids[0, 1:, None]).sum().item()
        num_bytes += len(text.encode())
    assert float(row.split()[1]) == pytest.approx(nats / num_bytes, rel=0.02)  # bf16 if the processor supports it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--min-count", "1000"), "lower --min-count"),
        (("--noise", "-1"), "--noise must be 0 or more, not -1.0"),
        (("--forms",), "--forms are texts of a task; name one that has some with --task MODULE"),
    ],
)
def test_errors_are_one_sentence_and_leave_nothing(folder, arguments, message) -> None:
    done = run(folder, "--out", "refused", *arguments)
    last = done.stderr.strip().splitlines()[-1]  # torchao may print warnings before it
    assert done.returncode == 2 and last.startswith("error: ") and message in last, done.stderr
    assert not (folder / "refused").exists() and not (folder / "refused.tmp").exists()
