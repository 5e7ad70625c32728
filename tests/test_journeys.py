"""The three walks of the docs, command by command as the page has them, with a tiny model and tiny data under the page's names."""

import hashlib
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from tests.processes import ROOT, run_python
from tests.test_docs import commands
from tests.tiny import SENTENCES, write_chat_file, write_tiny_model

pytestmark = pytest.mark.slow
MODEL = "artifacts/models/SmolLM2-135M-Instruct"
# The page's words, and the words for a model with a window of 2,048 tokens.
TINY = {
    " MODEL ": f" {MODEL} ",
    "model.path=MODEL ": f"model.path={MODEL} ",
    "--length 12288": "--length 768 --bucket 256",
    "data.sequence_length=16384": "data.sequence_length=4096",
}
# Stands in for the package simple-icd-10-cm: 60 categories with two codes each.
ICD = """
CATEGORIES = [f"{letter}{i:02}" for letter in "ABC" for i in range(20)]
def get_all_codes(): return [c for category in CATEGORIES for c in (category, category + ".0", category + ".1")]
def is_category(code): return len(code) == 3
def is_extended_subcategory(code): return code.endswith(".1")
def get_descendants(category): return [category + ".0", category + ".1"]
def get_description(code): return f"Hypercholesterolaemia of kind {code[0].lower()}, unspecified"
def get_includes(code): return []
def get_inclusion_term(code): return [f"Familial hypercholesterolaemia {code[0]}. Seen in {code[1:]} patients."]
"""
# Runs a script whose standard input is the file named first.
WITH_INPUT = """
import runpy, sys
sys.stdin, sys.argv = open(sys.argv[1], encoding="utf-8"), sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write the files that a reader of the pages brings or downloads."""
    model = write_tiny_model(tmp_path / MODEL)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.iterdir()}
    fetched = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "source": "hub", "revision": "main", "files": hashes}
    (model / "fetched.json").write_text(json.dumps(fetched))
    write_chat_file(tmp_path / "mine.jsonl", 60)
    (tmp_path / "long.jsonl").write_text(f"{json.dumps({'text': ' '.join(SENTENCES * 4)})}\n" * 3)
    (tmp_path / "questions.txt").write_text(f"{SENTENCES[0]}\n")
    (tmp_path / "simple_icd_10_cm.py").write_text(ICD)
    (tmp_path / "with_input.py").write_text(WITH_INPUT)
    return tmp_path


def walk(page: str, folder: Path) -> dict[str, str]:
    """Run the commands of the page's numbered sections, in their order. Return the output of each; fail at an exit code."""
    outputs = {}
    path = ROOT / "docs" / page
    steps = "".join(re.findall(r"^## \d.*?(?=^## |\Z)", path.read_text(encoding="utf-8"), re.M | re.S))
    for line in filter(steps.__contains__, commands(path)):
        text = line
        for name, tiny in TINY.items():
            text = text.replace(name, tiny)
        command, _, questions = text.partition(" < ")
        program, script, *words = shlex.split(command, comments=True)
        assert program == "python", line
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
        words = [str(ROOT / script) if (ROOT / script).exists() else script, *words]
        if script == "train.py":
            words += ["optimizer.max_steps=2"]
        if questions:
            words = ["with_input.py", questions.strip(), *words]
        done = run_python(folder / words[0], *words[1:], cwd=folder, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        outputs[line] = done.stdout
    return outputs


def output_of(outputs: dict[str, str], script: str) -> str:
    return next(output for line, output in outputs.items() if script in line)


def test_chats_become_an_export_to_serve(folder) -> None:
    outputs = walk("chats.md", folder)
    assert "already exists; its" in output_of(outputs, "fetch_base_model.py")
    assert re.search(r"⟦.+<\|im_end\|>⟧", output_of(outputs, "data.py show"), re.S)
    assert all(name in output_of(outputs, "chat.py") for name in (MODEL, "runs/mine/export"))
    assert (folder / "release/mine/model.safetensors").exists() and (folder / "release/mine/README.md").exists()


def test_window_becomes_longer(folder) -> None:
    outputs = walk("long_context.md", folder)
    assert "yarn" in output_of(outputs, "positions")
    config = json.loads((folder / "runs/longer/export/config.json").read_text())
    assert config["max_position_embeddings"] == 4096 and config["rope_parameters"]["rope_type"] == "yarn"


def test_vocabulary_then_texts_then_instructions(folder) -> None:
    page = (ROOT / "docs/vocabulary.md").read_text(encoding="utf-8")
    code = re.search(r"^    # make_icd.py\n(?:(?:    .*)?\n)+", page, re.M)
    assert code
    (folder / "make_icd.py").write_text(textwrap.dedent(code[0]))
    outputs = walk("vocabulary.md", folder)
    assert re.search(r"icd_texts_held_out.jsonl .* -\d\d\.\d\d%", output_of(outputs, "extend_vocabulary.py"))
    tokens = [
        token["text"]
        for token in json.loads((folder / "artifacts/models/SmolLM2-135M-icd/new_tokens.json").read_text())["tokens"]
    ]
    assert any("hypercholesterolaemia" in token.lower() for token in tokens) and not any(
        ". " in token for token in tokens
    )
    assert json.loads((folder / "runs/icd/export/config.json").read_text())["vocab_size"] == 384 + len(tokens)
