"""The command scripts/extend_vocabulary.py on a tiny model: its output, the new model directory, and errors."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.formats import example_text, read_files
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
    """Extend the vocabulary. Return the output."""
    options = ("--task", "xbrl.task", "--held-out", "held_out.jsonl", "--new-tokens", "40")
    return run_successfully(folder, "--out", "new", *options)


def test_model_is_written_and_the_effect_is_printed(folder, output) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "new")
    model = AutoModelForCausalLM.from_pretrained(folder / "new")
    record = json.loads((folder / "new" / "new_tokens.json").read_text())
    listed = record.pop("tokens")
    assert record == {"base": "model", "first_id": 384}
    assert len(tokenizer) == 384 + len(listed) == model.config.vocab_size
    assert [tokenizer.decode([384 + i]) for i in range(len(listed))] == [token["text"] for token in listed]
    assert {"r0010", " c0010", "C 03.00"} <= {token["text"] for token in listed}
    # The printed table against a separate count.
    texts = [example_text(example) for _, example in read_files([folder / "held_out.jsonl"])]
    base = AutoTokenizer.from_pretrained(folder / "model")
    before, after = (sum(len(t.encode(x, add_special_tokens=False)) for x in texts) / 30 for t in (base, tokenizer))
    row = next(line for line in output.splitlines() if "held_out.jsonl" in line and "%" in line)
    assert row.split()[-4:] == [f"{before:.1f}", f"{after:.1f}", f"{after / before - 1:+.2%}", "30"]
    assert after < 0.6 * before
    assert not (folder / "new.tmp").exists()


def test_extended_model_can_be_extended_again(folder, output) -> None:
    options = ("--patterns", r"Capital \w+", "--min-count", "5")
    run_successfully(folder, "--out", "again", *options, model="new")
    paths = (folder / "new", folder / "again")
    old, new = (load_file(path / "model.safetensors")["model.embed_tokens.weight"] for path in paths)
    assert len(new) > len(old) and (new[: len(old)] == old).all()


def test_patterns_none_switches_off_those_of_task(folder) -> None:
    run_successfully(folder, "--out", "plain", "--task", "xbrl.task", "--patterns", "none", "--min-count", "5")
    texts = [token["text"] for token in json.loads((folder / "plain" / "new_tokens.json").read_text())["tokens"]]
    assert texts and not any(re.search(r"\d", text) for text in texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--min-count", "1000"), "lower --min-count"),
        (("--patterns", "(r)"), "--patterns: '(r)' has a group"),
        (("--forms",), "--forms are texts of a task; name one that has some with --task MODULE"),
    ],
)
def test_errors_are_one_sentence_and_leave_nothing(folder, arguments, message) -> None:
    done = run(folder, "--out", "refused", *arguments)
    last = done.stderr.strip().splitlines()[-1]  # torchao may print warnings before it
    assert done.returncode == 2 and last.startswith("error: ") and message in last, done.stderr
    assert not (folder / "refused").exists() and not (folder / "refused.tmp").exists()
