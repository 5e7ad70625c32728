"""Test data without network access: random Hugging Face model directories with a tokenizer, and chat examples."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from data.encoding import ExampleEncoder

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, as in SmolLM2
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "The bank shall hold own funds of at least 8% of its total risk exposure amount at all times.",
    "The liquidity coverage ratio of the bank is 97.3%, below the minimum of 100% at the reporting date.",
    "Violations: none. Directive: the bank shall report to the supervisor on the last day of each month.",
    "C 03.00 r0010 c0010 CET1 capital ratio; C 47.00 r0340 c0010 leverage ratio; C 76.00 r0030 c0010 LCR.",
]
WORDS = sorted(set(" ".join(SENTENCES).split()))

# Model families: (model type, settings). The settings switch on all deviations from a plain causal decoder.
FAMILIES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral_sliding": ("mistral", {"sliding_window": 8}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "granite": (
        "granite",
        {"logits_scaling": 4.0, "attention_multiplier": 0.5, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    ),
}


# More families, each with its deviations switched on. Sliding windows are 8 tokens, shorter than the documents.
OTHER_FAMILIES = {
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}),
    "arcee": ("arcee", {}),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 8, "layer_types": ["sliding", "full"]}),
    "ernie4_5": ("ernie4_5", {"use_bias": True}),
    "exaone4": ("exaone4", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma3_text": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 32, "layer_types": ["sliding", "full"]},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding", "full"], "num_local_experts": 6}
        | {"num_experts_per_tok": 2, "intermediate_size": 32},
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True}),
    "helium": ("helium", {"head_dim": 16}),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0},
        },
    ),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            }
            | {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1},
        },
    ),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding", "full"]}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 3.0}),
    "olmo": ("olmo", {"clip_qkv": 1.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 8, "layer_types": ["sliding", "full"]}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "seed_oss": (
        "seed_oss",
        {"head_dim": 16, "attention_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    ),
    "smollm3": ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0]}),
    "starcoder2": (
        "starcoder2",
        {"sliding_window": 8, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
}


SIZES = {
    **{
        "num_experts": 6,
        "num_local_experts": 6,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    **{
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "shared_expert_intermediate_size": 32,
    },
    **{"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "conv_L_cache": 3,
        "head_dim": 16,
    },
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384, "global_head_dim": 16, "sliding_window": 8},
    **{
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 128,
        "shared_intermediate_size": 64,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
    },
}
# Types that a run proves at its start (model/proof.py), with the sizes of SIZES that they have: settings beside those.
AT_START = {
    "qwen3_5_text": {"layer_types": ["linear", "full"]},
    "lfm2": {"layer_types": ["conv", "full"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_text": {"layer_types": ["sliding", "full"] * 2, "num_kv_shared_layers": 2, "num_hidden_layers": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8},
    "glm4_moe": {},
    "mixtral": {},
    "llama4_text": {},
    "gpt2": {},
    "gpt_neox": {},
    "bloom": {},
}


COMMON = {  # for every type, beside SIZES
    **{
        "vocab_size": 384,
        "hidden_size": 64,
        "d_model": 64,
        "dim": 64,
        "num_hidden_layers": 4,
        "n_layers": 4,
        "num_layers": 4,
    },
    **{"num_attention_heads": 4, "n_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "ffn_dim": 128},
    **{
        "ffn_hidden_size": 128,
        "max_position_embeddings": 512,
        "n_positions": 512,
        "n_ctx": 512,
        "initializer_range": 0.1,
    },
    **{
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "attention_window_size": 8,
    },
}
SPECIAL = {
    "deepseek_v2": {"num_key_value_heads": 4},
    **dict.fromkeys(
        ("deepseek_v32", "axk1", "axk2", "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3")
        + ("sarvam_mla", "youtu"),
        {"num_key_value_heads": 4, "head_dim": 8},
    ),
    **dict.fromkeys(("codegen", "gptj"), {"rotary_dim": 8}),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8, "mamba_ngroups": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    **dict.fromkeys(
        ("inkling2_text", "inkling2_loop_text"),
        {"unpadded_vocab_size": 380, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
        | {"sliding_window_size": 8, "rel_extent": 64},
    ),
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "olmo_hybrid": {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
}


def tiny_config(
    family: str = "llama",
    tied: bool = True,
    vocab_size: int = 384,
    layers: int = 2,
    hidden: int = 64,
    **changes: object,
) -> PretrainedConfig:
    """Return the config of a model of `family` (a key of FAMILIES, OTHER_FAMILIES or AT_START). 4 query heads share 2 key-value heads.

    eos = pad = <|im_end|>, as in SmolLM2. `vocab_size` is at least 259: 256 bytes and 3 special tokens. changes: to config.json.
    """
    if family in AT_START:
        defaults = AutoConfig.for_model(family).to_dict()
        model_type, extra = (
            family,
            {name: value for name, value in SIZES.items() if name in defaults} | AT_START[family],
        )
    else:
        model_type, extra = (FAMILIES | OTHER_FAMILIES)[family]
    if "layer_types" in extra:
        names = {"linear": "linear_attention", "sliding": "sliding_attention", "full": "full_attention"}
        extra = extra | {"layer_types": [names.get(kind, kind) for kind in extra["layer_types"]]}
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float32",
        "intermediate_size": 2 * hidden,
    }
    return AutoConfig.for_model(model_type, **(sizes | extra | changes))


def any_tiny_config(kind: str) -> PretrainedConfig:
    """Return a tiny config of any causal model type of transformers: its defaults with the sizes of SIZES that it has."""
    if kind in FAMILIES | OTHER_FAMILIES | AT_START:
        return tiny_config(kind, tied=False)
    config = AutoConfig.for_model(kind)
    text = config.get_text_config()
    keys = {*text.to_dict(), *getattr(type(text), "attribute_map", {})}
    sizes = {name: value for name, value in (COMMON | SIZES).items() if name in keys}
    return AutoConfig.for_model(text.model_type, **(sizes | SPECIAL.get(kind, {})))


def write_tiny_model(
    directory: str | Path,
    family: str = "llama",
    tied: bool = True,
    vocab_size: int = 384,
    seed: int = 0,
    **changes: object,
) -> Path:
    """Save a random fp32 model of `tiny_config` with its tokenizer; return `directory`.

    Weights have standard deviation 0.1, so that attention is far from uniform, and biases and norms get noise of 0.1.
    """
    directory, config = Path(directory), tiny_config(family, tied, vocab_size, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tiny_tokenizer(vocab_size).save_pretrained(directory)
    return directory


def tiny_tokenizer(vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on SENTENCES: at most `vocab_size` tokens, one per digit, ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def encode_one(tokenizer: PreTrainedTokenizerBase, example: dict) -> tuple[list[int], list[bool]]:
    """Return (token ids, is_target) of an example with a single sequence whose targets all weigh 1."""
    outcome = ExampleEncoder(tokenizer).encode([example])[0]
    assert outcome.error is None, outcome.error
    (sequence,) = outcome.sequences
    return sequence.ids.tolist(), sequence.weights().tolist()


def write_chat_file(path: str | Path, n: int, seed: int = 0) -> Path:
    """Write `n` examples as JSON lines, each with one question (5-40 words) and one answer (3-25 words)."""

    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    path = Path(path)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            question = {"role": "user", "content": f"Report {i}: {text(5, 40)}"}
            answer = {"role": "assistant", "content": text(3, 25)}
            file.write(json.dumps({"id": f"example-{i}", "messages": [question, answer]}) + "\n")
    return path
