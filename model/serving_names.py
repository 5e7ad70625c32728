"""Whether the loaders of vLLM and llama.cpp know every tensor of a model directory, by names and shapes. Neither is run.

vLLM stacks projections that are applied to the same input: q_proj, k_proj and v_proj fill qkv_proj, gate_proj and up_proj
fill gate_up_proj. A name that belongs to no parameter ends its start, as does a parameter that nothing fills, except for the
head of a model with tied embeddings (docs.vllm.ai, API reference, vllm.model_executor.models.utils.AutoWeightsLoader and
vllm.model_executor.models.llama, qwen2, qwen3; read for v0.9 to v0.31). What a layer of these four families has is written
down here from those pages.

llama.cpp's converter looks each name up in the tables of the package gguf (github.com/ggml-org/llama.cpp, gguf-py,
tensor_mapping.py), which are used here as they are.
"""

from collections import Counter
from importlib import metadata

from transformers import PretrainedConfig

Shapes = dict[str, tuple[int, ...]]
VLLM = ("llama", "mistral", "qwen2", "qwen3")  # model types that are described here
# model_type -> architecture of the package gguf. Mistral is a Llama there.
GGUF = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "granite": "GRANITE",
    "cohere2": "COHERE2",
    "olmo2": "OLMO2",
    "phi3": "PHI3",
    "smollm3": "SMOLLM3",
    "starcoder2": "STARCODER2",
}
STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
STACKED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def expected_by_vllm(config: PretrainedConfig) -> Shapes:
    """Name in the files -> shape that vLLM's parameter, or its part of a stacked one, has. For the model types of VLLM."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head_dim, kv_heads * head_dim
    kind = config.model_type
    attention_bias = kind == "qwen2" or bool(getattr(config, "attention_bias", False))
    output_bias = kind == "llama" and attention_bias
    mlp_bias = kind == "llama" and bool(getattr(config, "mlp_bias", False))
    matrices = {
        "self_attn.q_proj": (queries, hidden, attention_bias),
        "self_attn.k_proj": (keys, hidden, attention_bias),
        "self_attn.v_proj": (keys, hidden, attention_bias),
        "self_attn.o_proj": (hidden, queries, output_bias),
        "mlp.gate_proj": (inner, hidden, mlp_bias),
        "mlp.up_proj": (inner, hidden, mlp_bias),
        "mlp.down_proj": (hidden, inner, mlp_bias),
    }
    layer: Shapes = {f"{name}.weight": (rows, columns) for name, (rows, columns, _) in matrices.items()}
    layer |= {f"{name}.bias": (rows,) for name, (rows, _, has_bias) in matrices.items() if has_bias}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if kind == "qwen3":
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    expected: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        expected["lm_head.weight"] = (config.vocab_size, hidden)
    for number in range(config.num_hidden_layers):
        expected |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return expected


def vllm_line(config: PretrainedConfig, shapes: Shapes) -> tuple[bool, str]:
    """(whether nothing is wrong, one line that says so or what is wrong)."""
    if config.model_type not in VLLM:
        return True, f"vLLM: not checked: what it expects of {config.model_type} is not described here"
    expected = expected_by_vllm(config)
    problems = [f"{name} is missing" for name in expected.keys() - shapes.keys()]
    for name, shape in shapes.items():
        if name not in expected and not (name == "lm_head.weight" and config.tie_word_embeddings):
            problems.append(f"{name} belongs to no parameter")
        elif name in expected and shape != expected[name]:
            problems.append(f"{name} has shape {shape} instead of {expected[name]}")
    if problems:
        return False, f"vLLM: {len(problems)} tensors do not fit: {', '.join(sorted(problems)[:3])}"
    parameters = {".".join(STACKED.get(part, part) for part in name.split(".")) for name in shapes}
    return True, (
        f"vLLM: names and shapes of {len(shapes)} tensors fit the {len(parameters)} parameters of its {config.model_type} "
        "model; vLLM itself was not run"
    )


def gguf_line(config: PretrainedConfig, shapes: Shapes) -> tuple[bool, str]:
    """(whether nothing is wrong, one line that says so or what is wrong)."""
    if config.model_type not in GGUF:
        return True, f"llama.cpp: not checked: the architecture of {config.model_type} in gguf is not known here"
    from gguf import MODEL_ARCH, get_tensor_name_map  # not needed for training

    names = get_tensor_name_map(MODEL_ARCH[GGUF[config.model_type]], config.num_hidden_layers)
    found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes}
    unknown = sorted(name for name, mapped in found.items() if mapped is None)
    twice = [mapped for mapped, count in Counter(found.values()).items() if mapped and count > 1]
    if unknown or twice:
        what = f"{unknown[0]} has no name" if unknown else f"{twice[0]} is named by two tensors"
        return False, f"llama.cpp: {what} in the architecture {GGUF[config.model_type]} of gguf"
    return True, (
        f"llama.cpp: each of {len(shapes)} tensors has a name in the architecture {GGUF[config.model_type]} of gguf "
        f"{metadata.version('gguf')}"
    )
