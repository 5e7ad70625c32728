"""scripts/export.py --gguf: the check of the converted file, and the Modelfile for Ollama."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from data.chat_template import ChatSettings, ChatTemplate
from scripts.export.gguf_file import read_pieces, write_gguf
from tests.chat_families import FAMILIES, family_tokenizer

CONVERTER = Path(__file__).with_name("gguf_converter.py")
CHATML = '''FROM ./mine.gguf
TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system
{{ .Content }}<|im_end|>
{{ else if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
<|im_start|>assistant
{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>
{{ end }}{{ end }}"""
SYSTEM """Help."""
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|endoftext|>"
PARAMETER num_ctx 512
PARAMETER temperature 0
PARAMETER repeat_penalty 1
'''


def pieces(family: str):  # noqa: ANN201
    stops = [FAMILIES[family].eos, *FAMILIES[family].stops]
    template = ChatTemplate(family_tokenizer(family), ChatSettings(date="2026-01-01"))
    return read_pieces(template, stops, FAMILIES[family].bos or "")


@pytest.fixture
def written(tmp_path):
    """Return a function that converts an export of a tokenizer's family, and the path of the Modelfile."""

    def write(family: str) -> tuple[list[str], Path]:
        tokenizer, out = family_tokenizer(family), tmp_path / "mine"
        tokenizer.save_pretrained(out)
        stop_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        (out / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
        lines = write_gguf(out, CONVERTER, tokenizer, ChatSettings(), "bfloat16", 512)
        return lines, tmp_path / "mine-gguf" / "Modelfile"

    return write


def test_modelfile_has_template_system_and_stops(written) -> None:
    lines, modelfile = written("smollm2")
    assert modelfile.read_text() == CHATML
    assert lines[0].startswith("1 tensors in bfloat16 -> ") and lines[1].endswith(f"ollama create mine -f {modelfile}")


def test_no_modelfile_for_a_rewriting_template(monkeypatch, written) -> None:
    monkeypatch.setattr("scripts.export.gguf_file.read_pieces", lambda *arguments: None)
    lines, modelfile = written("smollm2")
    assert lines[1].startswith("no Modelfile: ") and not modelfile.exists()
    assert modelfile.with_name("mine.gguf").is_file()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        ("exit", "did not convert .*mine: Model Tiny is not supported"),
        ("template", "wrote another chat template than "),
        ("end", "wrote the end token .*, but answers end with "),
    ],
)
def test_a_wrong_conversion_leaves_nothing(written, tmp_path, monkeypatch, spoil, sentence) -> None:
    monkeypatch.setenv("SPOIL", spoil)
    with pytest.raises(UserError, match=sentence):
        written("smollm2")
    assert not (tmp_path / "mine-gguf").exists()


def test_pieces_of_templates_with_equal_prompts() -> None:
    gemma = pieces("gemma3")
    assert gemma and gemma.opening == "<start_of_turn>user\n" and gemma.around["system"] == ("", "\n\n")
    deepseek = pieces("deepseek-v2")
    assert deepseek and deepseek.around["assistant"][0] == " "
    for family in ("gemma", "mistral-v3", "deepseek-r1"):  # no system role, moves the system message, drops thinking
        assert pieces(family) is None, family
