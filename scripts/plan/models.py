"""The shapes of the models that are most used, by their names on the hub, so that they can be planned without a network.

Only architectures that this project trains are listed. tests/scripts/plan/test_models.py builds each model and compares its
number of parameters with the published number.

Sources: the configurations of litgpt (https://github.com/Lightning-AI/litgpt/blob/main/litgpt/config.py, read in 2026) and,
for Mistral Nemo, SmolLM3 and Gemma 3 270M, the `config.json` or GGUF header of the published weights.
"""

import re
from collections.abc import Iterator

from transformers import AutoConfig, PretrainedConfig

from common.errors import UserError

SHAPE_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings", "head_dim", "max_position_embeddings"),
)
EXPERT_KEYS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")

# Name on the hub -> (millions of parameters, model type, values of SHAPE_KEYS, sliding window or None, values of EXPERT_KEYS)
_SHAPES: dict[str, tuple] = {
    "Qwen/Qwen3-0.6B": (596, "qwen3", 1024, 3072, 28, 16, 8, 151936, True, 128, 40960),
    "Qwen/Qwen3-1.7B": (1721, "qwen3", 2048, 6144, 28, 16, 8, 151936, True, 128, 40960),
    "Qwen/Qwen3-4B": (4022, "qwen3", 2560, 9728, 36, 32, 8, 151936, True, 128, 40960),
    "Qwen/Qwen3-4B-Instruct-2507": (4022, "qwen3", 2560, 9728, 36, 32, 8, 151936, True, 128, 262144),
    "Qwen/Qwen3-8B": (8191, "qwen3", 4096, 12288, 36, 32, 8, 151936, False, 128, 40960),
    "Qwen/Qwen3-14B": (14768, "qwen3", 5120, 17408, 40, 40, 8, 151936, False, 128, 40960),
    "Qwen/Qwen3-32B": (32762, "qwen3", 5120, 25600, 64, 64, 8, 151936, False, 128, 40960),
    "Qwen/Qwen3-30B-A3B": (
        *(30532, "qwen3_moe", 2048, 6144, 48, 32, 4, 151936, False, 128, 40960),
        *(None, 128, 8, 768),
    ),
    "Qwen/Qwen2.5-0.5B": (494, "qwen2", 896, 4864, 24, 14, 2, 151936, True, 64, 32768),
    "Qwen/Qwen2.5-1.5B": (1544, "qwen2", 1536, 8960, 28, 12, 2, 151936, True, 128, 131072),
    "Qwen/Qwen2.5-3B": (3086, "qwen2", 2048, 11008, 36, 16, 2, 151936, True, 128, 32768),
    "Qwen/Qwen2.5-7B": (7616, "qwen2", 3584, 18944, 28, 28, 4, 152064, False, 128, 131072),
    "Qwen/Qwen2.5-14B": (14770, "qwen2", 5120, 13824, 48, 40, 8, 152064, False, 128, 131072),
    "Qwen/Qwen2.5-32B": (32764, "qwen2", 5120, 27648, 64, 40, 8, 152064, False, 128, 131072),
    "Qwen/Qwen2.5-72B": (72706, "qwen2", 8192, 29568, 80, 64, 8, 152064, False, 128, 131072),
    "meta-llama/Llama-3.2-1B": (1236, "llama", 2048, 8192, 16, 32, 8, 128256, True, 64, 131072),
    "meta-llama/Llama-3.2-3B": (3213, "llama", 3072, 8192, 28, 24, 8, 128256, True, 128, 131072),
    "meta-llama/Llama-3.1-8B": (8030, "llama", 4096, 14336, 32, 32, 8, 128256, False, 128, 131072),
    "meta-llama/Llama-3.1-70B": (70554, "llama", 8192, 28672, 80, 64, 8, 128256, False, 128, 131072),
    "meta-llama/Llama-3.3-70B-Instruct": (70554, "llama", 8192, 28672, 80, 64, 8, 128256, False, 128, 131072),
    "meta-llama/Llama-2-7b-hf": (6738, "llama", 4096, 11008, 32, 32, 32, 32000, False, 128, 4096),
    "meta-llama/Llama-2-13b-hf": (13016, "llama", 5120, 13824, 40, 40, 40, 32000, False, 128, 4096),
    "google/gemma-3-270m": (268, "gemma3_text", 640, 2048, 18, 4, 1, 262144, True, 256, 32768, 512),
    "google/gemma-3-1b-pt": (1000, "gemma3_text", 1152, 6912, 26, 4, 1, 262144, True, 256, 32768, 512),
    "google/gemma-2-2b": (2614, "gemma2", 2304, 9216, 26, 8, 4, 256000, True, 256, 8192, 4096),
    "google/gemma-2-9b": (9242, "gemma2", 3584, 14336, 42, 16, 8, 256000, True, 256, 8192, 4096),
    "google/gemma-2-27b": (27227, "gemma2", 4608, 36864, 46, 32, 16, 256000, True, 128, 8192, 4096),
    "mistralai/Mistral-7B-v0.3": (7248, "mistral", 4096, 14336, 32, 32, 8, 32768, False, 128, 32768),
    "mistralai/Mistral-Nemo-Base-2407": (12248, "mistral", 5120, 14336, 40, 32, 8, 131072, False, 128, 128000),
    "microsoft/phi-4": (14660, "phi3", 5120, 17920, 40, 40, 10, 100352, False, 128, 16384),
    "microsoft/Phi-4-mini-instruct": (3836, "phi3", 3072, 8192, 32, 24, 8, 200064, True, 128, 131072),
    "HuggingFaceTB/SmolLM2-135M": (135, "llama", 576, 1536, 30, 9, 3, 49152, True, 64, 8192),
    "HuggingFaceTB/SmolLM2-360M": (362, "llama", 960, 2560, 32, 15, 5, 49152, True, 64, 8192),
    "HuggingFaceTB/SmolLM2-1.7B": (1711, "llama", 2048, 8192, 24, 32, 32, 49152, True, 64, 8192),
    "HuggingFaceTB/SmolLM3-3B": (3075, "smollm3", 2048, 11008, 36, 16, 4, 128256, True, 128, 65536),
    "allenai/OLMo-2-1124-7B": (7299, "olmo2", 4096, 11008, 32, 32, 32, 100352, False, 128, 4096),
    "allenai/OLMo-2-1124-13B": (13716, "olmo2", 5120, 13824, 40, 40, 40, 100352, False, 128, 4096),
}
MODELS = tuple(_SHAPES)
# For a plan before a model is chosen. Contexts up to MOST_POSITIONS can be planned with any of these.
SIZES = {
    "135M": "HuggingFaceTB/SmolLM2-135M",
    "1B": "meta-llama/Llama-3.2-1B",
    "3B": "meta-llama/Llama-3.2-3B",
    "7B": "meta-llama/Llama-2-7b-hf",
    "8B": "meta-llama/Llama-3.1-8B",
    "13B": "meta-llama/Llama-2-13b-hf",
    "70B": "meta-llama/Llama-3.1-70B",
    "30B-A3B": "Qwen/Qwen3-30B-A3B",
}
MOST_POSITIONS = 131072
# Parts of a name by which only the training differs, not the shape.
_TRAINING = re.compile(r"-(instruct|base|it|pt|chat|thinking|hf)(?=-|$)|^meta-(?=llama)")


def known_config(name: str) -> PretrainedConfig | None:
    """Return the configuration of a size of SIZES or of a model of MODELS; None for any other name.

    Upper and lower case are equal, the organisation may be left out, and a base model and its chat model share an entry.
    """
    size = next((size for size in SIZES if size.lower() == name.lower()), None)
    if size:
        return _config(SIZES[size], max_position_embeddings=MOST_POSITIONS)
    organisation, _, short = name.rpartition("/")
    for known in MODELS:
        owner, _, known_short = known.partition("/")
        if _plain(short) == _plain(known_short) and organisation.lower() in ("", owner.lower()):
            return _config(known)
    return None


def named_config(name: str) -> PretrainedConfig:
    """Return the configuration of a size or of a known model. Raise UserError for any other name."""
    if config := known_config(name):
        return config
    raise UserError(
        f"{name} is neither a model directory, nor an id on the hub (ORG/NAME), nor one of {', '.join(SIZES)}, nor a model whose "
        "shape is known here (docs/planning.md)"
    )


def smaller_models(num_parameters: int, model_type: str) -> Iterator[tuple[str, int, PretrainedConfig]]:
    """Yield (name, number of parameters, configuration) of the known models that are smaller, the largest first.

    Models of the same type come before all others, because their tokens are most alike.
    """
    by_preference = sorted(MODELS, key=lambda name: (_SHAPES[name][1] != model_type, -_SHAPES[name][0]))
    for name in by_preference:
        if _SHAPES[name][0] * 1e6 < 0.95 * num_parameters:
            yield name, _SHAPES[name][0] * 10**6, _config(name)


def published_millions(name: str) -> int:
    """Return the published number of parameters of a known model, in millions."""
    return _SHAPES[name][0]


def _config(name: str, **more: int) -> PretrainedConfig:
    _, model_type, *values = _SHAPES[name]
    shape = dict(zip(SHAPE_KEYS, values, strict=False))
    window, *experts = values[len(SHAPE_KEYS) :] or [None]
    # Mistral's class has a window by default, which no listed Mistral model has.
    settings = shape | {"sliding_window": window} | dict(zip(EXPERT_KEYS, experts, strict=False)) | more
    return AutoConfig.for_model(model_type, **settings)


def _plain(name: str) -> str:
    return _TRAINING.sub("", name.lower())
