"""Convert a GGUF file of the llama architecture to a Hugging Face directory: safetensors, config, tokenizer, chat template.

transformers can also read GGUF, but it needs accelerate, and whether it dequantises the weights depends on its version.
This conversion gives the same files with every version, and bitwise equal logits.
"""

import hashlib
import json
from pathlib import Path
from typing import cast

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from common.errors import UserError

# Tensor names of llama.cpp (ggml-org/llama.cpp, gguf-py/gguf/constants.py) -> those of Llama in transformers.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROOT_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens such as <|im_start|>


def convert_gguf(gguf_file: str | Path, directory: str | Path) -> None:
    """Write the model in `gguf_file` into the existing `directory` as fp32 safetensors with config and tokenizer.

    A 4-bit weight is `scale * q + minimum` with fp16 scale and minimum, which fp32 represents exactly; bf16 would round
    it. Raises UserError for an architecture other than llama or a tokenizer other than SmolLM's.
    """
    from gguf import GGUFReader  # only needed for this conversion

    reader = GGUFReader(str(gguf_file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kinds = (fields["general.architecture"], fields.get("tokenizer.ggml.pre"))
    if kinds != ("llama", "smollm"):
        raise UserError(
            f"{gguf_file}: architecture and tokenizer are {kinds}; only llama with the tokenizer smollm can be converted"
        )
    directory = Path(directory)
    tensors = read_tensors(reader, heads=fields["llama.attention.head_count"], kv_heads=_kv_heads(fields))
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors creates files that only their owner can read
    write_config(fields, tied="lm_head.weight" not in tensors, directory=directory)
    write_tokenizer(fields, directory)


def _kv_heads(fields: dict) -> int:
    return fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"])


def read_tensors(reader, heads: int, kv_heads: int) -> dict[str, np.ndarray]:  # noqa: ANN001 (gguf is imported late)
    """transformers' name -> weight, dequantised to fp32; matrices have the shape (out, in), as in `torch.nn.Linear`."""
    from gguf import dequantize

    tensors = {}
    for tensor in reader.tensors:
        stem, suffix = tensor.name.rsplit(".", 1)
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if stem in ROOT_NAMES:
            name = ROOT_NAMES[stem]
        else:
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{BLOCK_NAMES[part]}"
            if part in ("attn_q", "attn_k"):
                weight = undo_rope_order(weight, heads if part == "attn_q" else kv_heads)
        tensors[f"{name}.{suffix}"] = weight
    return tensors


def undo_rope_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key matrix from llama.cpp's RoPE layout to that of transformers.

    llama.cpp rotates adjacent rows (0, 1), (2, 3), ... of a head; transformers rotates row i with row i + head_dim / 2.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def write_config(fields: dict, tied: bool, directory: Path) -> None:
    """Write config.json and generation_config.json from the metadata of the GGUF file."""
    from transformers import GenerationConfig, LlamaConfig

    ids = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=_kv_heads(fields),
        max_position_embeddings=fields["llama.context_length"],
        # GGUF stores fp32: 9.9999997e-06 was 1e-05 in the original config.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        dtype="float32",
        **ids,
    )
    config.save_pretrained(directory)
    GenerationConfig(**ids).save_pretrained(directory)


def write_tokenizer(fields: dict, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE with single digits, and the model's chat template.

    Splitting numbers into single digits is what llama.cpp calls the pre-tokenizer "smollm". Without it, numbers would be
    split into tokens that the model has never seen.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
    ).save_pretrained(directory)


def tensor_digest(safetensors_file: str | Path) -> str:
    """sha256 over names, dtypes, shapes and values, sorted by name, so that it does not depend on the file's header."""
    digest = hashlib.sha256()
    with safe_open(str(safetensors_file), framework="np") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
            digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()


def greedy_completion(directory: str | Path, prompt: str, new_tokens: int = 8) -> str:
    """Greedy completion of `prompt` by the model in `directory`, in fp32.

    Raises UserError if the weights do not match the config.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    model, info = cast(tuple, loaded)  # the annotation of from_pretrained ignores output_loading_info
    if info["missing_keys"] or info["unexpected_keys"]:
        raise UserError(f"{directory}: the weights do not match config.json: {info}")
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
