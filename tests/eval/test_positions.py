"""Losses by position agree with transformers, and documents are spread over a text without overlap."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from eval.positions import buckets, cut_documents, document_losses, read_long_documents
from model import loss
from model.architectures import read_model_config
from model.language_model import load_for_evaluation
from tests.processes import run_python, run_ranks
from tests.tiny import tiny_tokenizer, write_tiny_model

CPU = torch.device("cpu")


def load(path, *rope):
    return load_for_evaluation(read_model_config(str(path), *rope), str(path), torch.float32, CPU)


@pytest.mark.parametrize("family", ["gemma2", "mistral_sliding"])
@pytest.mark.parametrize("chunk", [7, 512])
def test_position_losses_equal_transformers(tmp_path, monkeypatch, family, chunk) -> None:
    """The reference is eager attention: SDPA in transformers ignores Gemma 2's softcap. Windows have 8 tokens."""
    monkeypatch.setattr(loss, "LOSS_TOKENS", chunk)
    path = write_tiny_model(tmp_path / "model", family=family)
    documents = [torch.randint(0, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (50, 2, 90)]
    model = load(path)
    assert document_losses(model, [], CPU) == []
    losses = [document_losses(model, [ids], CPU)[0] for ids in documents]
    eager = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    for ids, nats in zip(documents, losses, strict=True):
        with torch.no_grad():
            log_p = eager(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = -log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert nats.dtype == torch.float64 and torch.allclose(nats, expected, atol=1e-4)


def test_a_bucket_sums_its_positions() -> None:
    """Entry t of a document's losses belongs to position t + 1. Here the loss of a token equals its position."""
    rows = buckets([torch.arange(1.0, 10.0), torch.arange(1.0, 6.0)], 4)
    assert [(b["start"], b["end"], b["nats"], b["tokens"]) for b in rows] == [
        (0, 4, 2 * (1 + 2 + 3), 6),
        (4, 8, (4 + 5 + 6 + 7) + (4 + 5), 6),
        (8, 10, 8 + 9, 2),
    ]
    assert rows[1]["mean"] == pytest.approx(31 / 6)
    assert buckets([], 4) == []


def test_documents_are_spread_without_overlap() -> None:
    ids = list(range(102))
    for length, most, starts in (
        (10, 2, [0, 50]),
        (10, 99, list(range(0, 100, 10))),
        (34, 4, [0, 34, 68]),
        (103, 9, []),
    ):
        assert cut_documents(ids, length, most) == [ids[start : start + length] for start in starts]
    assert cut_documents([5, 6, 7, 8], 3, 9, prefix=[1]) == [[1, 5, 6], [1, 7, 8]]


def test_positions_are_measured_with_scaled_rope(tmp_path) -> None:
    path = write_tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The bank shall hold own funds of at least 8% of its exposure. " * 80)
    options = ("--data", text, "--length", 600, "--bucket", 200, "--dtype", "fp32", "--json", tmp_path / "losses.json")
    script = "scripts/measure.py", "positions", path
    done = run_python(*script, *options, "--rope-type", "yarn", "linear", "--rope-factor", 2)
    assert done.returncode == 0, done.stderr
    assert "windows: as it is 512, yarn x2 1024, linear x2 1024" in done.stdout
    result = json.loads((tmp_path / "losses.json").read_text())
    assert result["documents"] == 2
    columns = result["buckets"]
    assert [b["tokens"] for b in columns["as it is"]] == [2 * 199, 2 * 200, 2 * 200]
    means = {name: [b["mean"] for b in column] for name, column in columns.items()}
    assert f"{'400-599':>15}     400" + "".join(f"{means[name][2]:>14.3f}" for name in means) in done.stdout
    ids = AutoTokenizer.from_pretrained(path).encode(text.read_text(), verbose=False)
    for name, rope in {"as it is": (), "yarn x2": ("yarn", 2.0), "linear x2": ("linear", 2.0)}.items():
        model, documents = load(path, *rope), cut_documents(ids, 600, 2)
        expected = buckets([document_losses(model, [tokens], CPU)[0] for tokens in documents], 200)
        assert means[name] == pytest.approx([b["mean"] for b in expected], abs=1e-6)
    assert abs(means["as it is"][2] - means["yarn x2"][2]) > 1e-3

    # Three ranks share the model; one of them has no document.
    sharded = run_ranks(3, *script, *options, "--sharding", "full")
    assert sharded.returncode == 0, sharded.stderr[-6000:]
    assert sharded.stdout.count("positions  tokens") == 1
    column = json.loads((tmp_path / "losses.json").read_text())["buckets"]["as it is"]
    assert [b["mean"] for b in column] == pytest.approx(means["as it is"], abs=1e-6)

    wrong = run_python(*script, "--length", 600, "--rope-factor", 2)
    assert wrong.returncode == 2 and "need a --rope-type" in wrong.stderr


def test_a_text_must_be_long_and_plain(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("The bank shall hold own funds. " * 80)
    with pytest.raises(UserError, match="no text has --length=60000 tokens, the longest has [0-9]+; provide more"):
        read_long_documents([tmp_path / "text.txt"], tiny_tokenizer(), 60000, 2)
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    with pytest.raises(UserError, match="chat.jsonl, line 1 has no `text`"):
        read_long_documents([tmp_path / "chat.jsonl"], tiny_tokenizer(), 100, 2)
