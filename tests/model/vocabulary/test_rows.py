"""Rows of new tokens: initialisation, tensors and files, and that padding exists during training only."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.errors import UserError
from data.batches import collate
from model.architectures import first_new_row, read_model_config
from model.language_model import build_on_meta, load_weights, vocabulary_names
from model.loss import visit_logits
from model.new_tokens import NewToken
from model.vocabulary import MULTIPLE, new_rows, read_base_tokenizer, sub_tokens, write_extension
from tests.in_memory import load_documents
from tests.losses import loss_of
from tests.tiny import tiny_tokenizer, write_chat_file, write_tiny_model

TEXTS = [" r0010", "C 03.00", " H2O ratio | ", ", of which"]
SUB_TOKENS = [[5, 9], [5, 9], [7, 8, 300], [301]]  # the first two would be equal without noise


def extend(source: Path, target: Path, texts: list[str] = TEXTS) -> dict[str, torch.Tensor]:
    target.mkdir(exist_ok=True)
    tokens = [NewToken(text, 1, 1) for text in texts]
    base = read_base_tokenizer(source)
    write_extension(source, target, read_model_config(str(source)), base, tokens)
    return {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_rows_without_noise_are_means() -> None:
    old = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    rows = new_rows(old, SUB_TOKENS, noise=0.0)
    assert torch.allclose(rows[0], (old[5] + old[9]) / 2, atol=1e-6)
    assert torch.allclose(rows[2], (old[7] + old[8] + old[300]) / 3, atol=1e-6)
    assert torch.equal(rows[3], old[301])


def test_noise_has_the_covariance_of_the_old_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(600, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 3
    rows = new_rows(old, [[1]] * 20_000, noise=0.5, seed=2)
    expected = 0.25 * torch.cov(old.T)
    assert torch.allclose(torch.cov(rows.T), expected, atol=0.03 * expected.abs().max())
    assert torch.allclose(rows.mean(0), old[1], atol=0.03)


def test_seed_determines_rows_with_equal_means() -> None:
    old = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    rows, again, other_seed = (new_rows(old, SUB_TOKENS, seed=seed) for seed in (0, 0, 1))
    assert 0.02 < (rows[0] - rows[1]).abs().mean() < 0.5
    assert torch.equal(rows, again) and not torch.equal(rows, other_seed)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma2", True)])
def test_embedding_and_head_grow_and_keep_rows(tmp_path, family, tied) -> None:
    source = write_tiny_model(tmp_path / "old", family, tied)
    old, new = load_file(source / "model.safetensors"), extend(source, tmp_path / "new")
    names = vocabulary_names(build_on_meta(read_model_config(str(source))))
    spelled = sub_tokens(read_base_tokenizer(source), TEXTS[2])
    assert len(names) == (1 if tied else 2)
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        added = 4 if name in names else 0
        assert new[name].shape[0] == tensor.shape[0] + added
        assert torch.equal(new[name][: len(tensor)], tensor)
        if added:
            assert torch.allclose(new[name][386], tensor[spelled].mean(0), atol=0.1)
    if not tied:
        assert not torch.allclose(new["lm_head.weight"][384:], new["model.embed_tokens.weight"][384:], atol=0.01)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (source, tmp_path / "new"))
    assert after.get_output_embeddings().weight.shape[0] == 388 == after.config.vocab_size
    assert (after.get_output_embeddings().weight is after.get_input_embeddings().weight) == tied
    ids = torch.arange(3, 60)[None]
    assert torch.equal(after(ids).logits[..., :384], before(ids).logits)


def test_a_model_of_several_files_keeps_its_dtype(tmp_path) -> None:
    write_tiny_model(tmp_path / "whole", tied=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "old", max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(tmp_path / "old")
    assert len(list((tmp_path / "old").glob("*.safetensors"))) > 2
    new = extend(tmp_path / "old", tmp_path / "new")
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    assert not (tmp_path / "new" / "model.safetensors.index.json").exists()  # a single file
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.vocab_size == 388
    model.model.norm.float()  # a model of two dtypes loses nothing
    model.save_pretrained(tmp_path / "mixed")
    tiny_tokenizer().save_pretrained(tmp_path / "mixed")
    mixed = extend(tmp_path / "mixed", tmp_path / "both")
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float32}
    assert all(torch.equal(mixed[name], tensor.float()) for name, tensor in new.items())


def test_unused_rows_of_the_old_model_are_replaced(tmp_path) -> None:
    source = write_tiny_model(tmp_path / "old")  # 384 rows
    tiny_tokenizer(370).save_pretrained(source)
    old = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    new = extend(source, tmp_path / "new")["model.embed_tokens.weight"]
    spelled = sub_tokens(read_base_tokenizer(source), TEXTS[2])
    assert new.shape[0] == 374 and torch.allclose(new[372], old[spelled].mean(0), atol=0.1)
    tiny_tokenizer(385).save_pretrained(source)
    with pytest.raises(UserError, match="has 385 tokens, but the model has only 384 rows"):
        extend(source, tmp_path / "other")


def test_rows_of_reextended_model_stay_new(tmp_path) -> None:
    """Otherwise LoRA would not train them, EWC would hold them, and an average would halve their updates."""
    source = write_tiny_model(tmp_path / "old")
    (source / "export.json").write_text("{}")  # the base is the export of a run; this file describes other weights
    extend(source, tmp_path / "once")
    extend(tmp_path / "once", tmp_path / "twice", [", both"])
    record = json.loads((tmp_path / "twice" / "new_tokens.json").read_text())
    assert [token["text"] for token in record["tokens"]] == [*TEXTS, ", both"] and record["base"] == str(source)
    assert first_new_row(tmp_path / "twice") == 384
    assert not (tmp_path / "once" / "export.json").exists()


@pytest.mark.parametrize("family, tied", [("llama", False), ("gemma2", True)])  # gemma2 has a softcap
def test_padding_affects_neither_losses_nor_gradients(tmp_path, family, tied) -> None:
    source = write_tiny_model(tmp_path / "old", family, tied)
    extend(source, tmp_path / "padded")
    settings = json.loads((shutil.copytree(tmp_path / "padded", tmp_path / "plain") / "config.json").read_text())
    assert settings.pop("make_vocab_size_divisible_by") == MULTIPLE
    (tmp_path / "plain" / "config.json").write_text(json.dumps(settings))
    documents = load_documents((str(write_chat_file(tmp_path / "chat.jsonl", 3)),), tiny_tokenizer(), 512, "error")
    batch = collate((0, 1, 2), documents)
    losses, gradients = [], []
    for name, rows in (("plain", 388), ("padded", 448)):
        model = build_on_meta(read_model_config(str(tmp_path / name)))
        load_weights(model, str(tmp_path / name), torch.device("cpu"))
        weights = (model.causal_lm.get_input_embeddings().weight, model.causal_lm.get_output_embeddings().weight)
        assert [len(weight) for weight in weights] == [rows, rows]
        assert all(not weight[388:].any() for weight in weights)
        assert getattr(weights[0], "unpadded_rows", None) == (388 if rows == 448 else None)
        losses.append(loss_of(model, batch))
        losses[-1].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        widths = []
        visit_logits(model.head, model(batch), lambda logits, start, widths=widths: widths.append(logits.shape[1]))
        assert set(widths) == {388}
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for name, gradient in gradients[0].items():
        padded = gradients[1][name]
        assert torch.allclose(padded[: len(gradient)], gradient, atol=1e-4)
        assert not padded[len(gradient) :].any()
