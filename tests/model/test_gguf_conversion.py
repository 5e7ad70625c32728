"""Conversion of GGUF files: equal logits, exact 4-bit weights, tokenizer."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.hub import convert_gguf
from tests.tiny import write_tiny_model

# Names in transformers' Llama -> names in llama.cpp (ggml-org/llama.cpp, gguf-py/gguf/constants.py).
ROOTS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEXT = "<|im_start|>user\nH2O content 4.31% in B 03.00 x0010?<|im_end|>\n"


def llama_cpp_order(weight, heads):
    """Reorder query and key rows like llama.cpp's converter, which interleaves the two halves of each head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, source, quantise):
    """Write the tiny Llama in `source` in llama.cpp's format. With `quantise`, the matrices of layers are stored in Q4_1."""
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template((source / "chat_template.jinja").read_text())
    for name, weight in load_file(source / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in ROOTS:
            writer.add_tensor(f"{ROOTS[stem]}.weight", weight)
            continue
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        part = PARTS[part]
        if part in ("attn_q", "attn_k"):
            weight = llama_cpp_order(
                weight, config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            )
        kind = gguf.GGMLQuantizationType.Q4_1 if quantise and weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"blk.{layer}.{part}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_converted_model_equals_the_original(tmp_path, tied):
    source = write_tiny_model(tmp_path / "source", tied=tied)
    target = tmp_path / "target"
    target.mkdir()
    write_gguf(tmp_path / "model.gguf", source, quantise=False)
    convert_gguf(tmp_path / "model.gguf", target)

    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(target)
    ids = before(TEXT)["input_ids"]
    assert after(TEXT)["input_ids"] == ids
    assert after.decode(ids) == TEXT
    assert (after.bos_token, after.eos_token, after.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    # Single digits: with this small vocabulary the ids alone would not show it.
    pieces = after.backend_tokenizer.pre_tokenizer.pre_tokenize_str("c0010 12")
    assert [piece for piece, _ in pieces] == ["c", "0", "0", "1", "0", "Ġ", "1", "2"]
    assert after.chat_template == before.chat_template

    old = AutoModelForCausalLM.from_pretrained(source)
    new, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert new.dtype == torch.float32
    assert new.config.tie_word_embeddings is tied
    assert (new.lm_head.weight is new.model.embed_tokens.weight) is tied
    assert new.generation_config.eos_token_id == new.config.eos_token_id == 2
    assert new.config.rms_norm_eps == old.config.rms_norm_eps
    assert new.config.rope_parameters == old.config.rope_parameters
    with torch.no_grad():
        assert torch.equal(new(torch.tensor([ids])).logits, old(torch.tensor([ids])).logits)


def test_four_bit_weights_are_dequantised_exactly(tmp_path):
    source = write_tiny_model(tmp_path / "source", layers=1)
    write_gguf(tmp_path / "model.gguf", source, quantise=True)
    convert_gguf(tmp_path / "model.gguf", tmp_path)
    weight = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    converted = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    # The definition of Q4_1: blocks of 32 values, scale and minimum in fp16, 16 levels.
    blocks = weight.reshape(-1, 32)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    scale = (high - low) / 15
    levels = np.clip((blocks - low) / scale + 0.5, 0, 15).astype(np.uint8)
    expected = scale.astype(np.float16).astype(np.float32) * levels + low.astype(np.float16).astype(np.float32)
    assert np.array_equal(converted, expected.reshape(weight.shape))
    assert 0 < np.abs(converted - weight).max() < 0.51 * scale.max()
