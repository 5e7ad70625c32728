"""RoPE scaling: a longer context window, set in the model's config before the model is built.

RoPE rotates each pair of dimensions of a query or key by position times the pair's frequency. Beyond the trained context length
low-frequency pairs reach angles that the model has never seen. Scaling by a factor brings the angles back into the trained range:

- `linear` divides every frequency by the factor (position interpolation, arXiv:2306.15595).
- `yarn` divides low frequencies only, so that high frequencies still distinguish nearby tokens, and multiplies queries and keys
  by 1 + 0.1 ln(factor), because attention over more tokens is flatter (arXiv:2309.00071).
- `llama3` divides low frequencies only, with other bounds and without the multiplication (Llama 3.1, arXiv:2407.21783).
- `longrope` divides each frequency by its own factor, from a search by the model's authors (arXiv:2402.13753).

transformers computes the frequencies (modeling_rope_utils), so an exported config.json gives the frequencies of training.
"""

import copy

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.errors import UserError

# Types that extend the window by a factor, with the additional settings of Llama 3.1.
STRETCHING = {"linear": {}, "yarn": {}, "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
TYPES = ("default", *STRETCHING, "longrope")
# In some config files of these types max_position_embeddings is already multiplied by the factor, in others it is not.
AMBIGUOUS_WINDOW = ("linear", "dynamic")
WHY_NOT_ISOLATED = {
    "dynamic": "its frequencies depend on the longest document in a micro-batch, which breaks the isolation of packed "
    "documents; choose yarn (model.rope_type=yarn, a model.rope_factor and model.rope_original_length)",
    "longrope": "its short and long factors differ, and the longest document in a micro-batch decides between them, which "
    "breaks the isolation of packed documents; set model.rope_type=longrope, which uses the long ones for all lengths",
}


def scaled_config(
    config: PretrainedConfig,
    rope_type: str | None,
    factor: float | None = None,
    original_length: int | None = None,
) -> PretrainedConfig:
    """Return a copy of `config` with RoPE of `rope_type` and a window of `factor` times `original_length` positions.

    `rope_type` is in TYPES; None returns `config` itself, and `default` removes scaling. `factor` is above 1, and None for
    `default` and `longrope`. `original_length` is the context length in tokens on which the model was trained before any
    scaling; None takes it from config.json. If RoPE differs by layer type (Gemma 3, OLMo 3), only the full-attention layers are
    scaled, as in Gemma 3 itself, because sliding-window layers never attend beyond their window.
    Raises UserError if the values contradict each other or do not fit the model.
    """
    if rope_type is None:
        if factor is not None or original_length is not None:
            raise UserError(f"rope_factor and rope_original_length need a rope_type: {', '.join(TYPES)}")
        return config
    if rope_type not in TYPES:
        raise UserError(f"rope_type must be one of {', '.join(TYPES)}, not {rope_type!r}")
    config = copy.deepcopy(config)
    if why := why_not_scaled(config):
        raise UserError(f"{why}; remove rope_type")
    if rope_type == "longrope":
        return _longrope_with_equal_factors(config, factor, original_length)
    current, trained = full_attention_parameters(config), trained_length(config)
    original = trained if original_length is None else original_length
    if original is None:
        raise UserError(
            f"the model has RoPE type {current['rope_type']}, and its config does not state the context length before scaling; "
            "set rope_original_length"
        )
    if not 0 < original <= (trained or config.max_position_embeddings):
        raise UserError(
            f"rope_original_length={original_length} is not between 1 and the "
            f"{trained or config.max_position_embeddings} positions that the model was trained on"
        )
    kept = ["rope_theta", "partial_rotary_factor"]
    if current["rope_type"] == rope_type:  # keep the model's additional settings, such as gpt-oss' truncate
        kept += current.keys() - {"attention_factor", "type"}  # attention_factor follows from the factor
    parameters = STRETCHING.get(rope_type, {}) | {"rope_type": rope_type}
    parameters |= {key: current[key] for key in kept if current.get(key) is not None}
    if rope_type == "default":
        if factor is not None:
            raise UserError(f"rope_type=default does not scale; remove rope_factor={factor:g}")
        window = original
    else:
        if factor is None or not 1 < factor < float("inf"):
            raise UserError(f"rope_type={rope_type} needs a rope_factor above 1, not {factor}")
        window = round(factor * original)
        if trained is not None and window <= trained:
            raise UserError(
                f"rope_factor={factor:g} x rope_original_length={original} is {window} positions, not more than the {trained} "
                "that the model was trained on"
            )
        parameters["factor"] = float(factor)
        if rope_type != "linear":
            parameters["original_max_position_embeddings"] = original
    if _differs_by_layer(config):
        parameters = config.rope_parameters | {"full_attention": parameters}
    config.rope_parameters, config.max_position_embeddings = parameters, window
    return _accepted_by_transformers(config, rope_type)


def why_not_scaled(config: PretrainedConfig) -> str:
    """Return the reason, as a clause, why no `rope_type` can be set for the model, or "" if it can be scaled."""
    kind = config.model_type
    if kind in ("cohere2", "exaone4") and config.sliding_window:
        layers = f"its sliding-window layers, which never attend further than {config.sliding_window} tokens"
        return f"{kind} uses RoPE only in {layers}, so there is nothing to scale"
    if kind in ("hunyuan_v1_dense", "ministral3"):
        return f"{kind} has settings of RoPE (alpha, llama_4_scaling_beta) that no rope_type keeps"
    return ""


def full_attention_parameters(config: PretrainedConfig) -> dict:
    """Return the RoPE settings of the model. If they differ by layer type, return those of the full-attention layers."""
    parameters = config.rope_parameters
    return parameters["full_attention"] if _differs_by_layer(config) else parameters


def trained_length(config: PretrainedConfig) -> int | None:
    """Return the context length before any scaling in tokens, or None if config.json does not state it."""
    current = full_attention_parameters(config)
    if current["rope_type"] in AMBIGUOUS_WINDOW:
        return None
    return current.get("original_max_position_embeddings") or config.max_position_embeddings


def check_length(sequence_length: int, config: PretrainedConfig, path: str) -> None:
    """Raise UserError if documents may be longer than the model's (scaled) context window."""
    window = config.max_position_embeddings
    if sequence_length > window:
        current = full_attention_parameters(config)
        scaled = "" if current["rope_type"] == "default" else f", as scaled by {current['rope_type']}"
        extend = ", or extend the window with model.rope_type=yarn and a model.rope_factor (docs/long_context.md)"
        extend = f"; {why}" if (why := why_not_scaled(config)) else extend
        raise UserError(
            f"data.sequence_length={sequence_length} exceeds the {window} positions of {path}{scaled}; shorten it{extend}"
        )


def check_document_isolation(config: PretrainedConfig) -> None:
    """Raise UserError if the frequencies of RoPE depend on the other documents of a micro-batch."""
    parts = config.rope_parameters or {}
    for part in parts.values() if _differs_by_layer(config) else (parts,):
        kind = (part or {}).get("rope_type")
        if kind == "dynamic" and part.get("alpha"):  # HunYuan: a fixed base
            continue
        if kind == "dynamic" or (kind == "longrope" and part["short_factor"] != part["long_factor"]):
            raise UserError(f"the model has RoPE type {kind}: {WHY_NOT_ISOLATED[kind]}")


def fix_frequencies(model: nn.Module) -> None:
    """Make longrope keep its initial frequencies, which is correct because its two sets of factors are equal.

    Otherwise transformers would inspect the positions in every forward: version 5.17 synchronizes with the device for this, and
    frequencies that are recomputed on a GPU differ from the CPU's in the last bit.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = "default"  # pyright: ignore[reportArgumentType]
            # transformers' initialisation of the buffer calls it for this type
            module.compute_default_rope_parameters = ROPE_INIT_FUNCTIONS["longrope"]  # pyright: ignore[reportArgumentType]


def _longrope_with_equal_factors(
    config: PretrainedConfig, factor: float | None, original_length: int | None
) -> PretrainedConfig:
    """Set both sets of longrope's factors to the set for long documents, so that documents of any length have equal frequencies.

    A model whose window is not scaled gets the short set. The export has the same settings. Raises UserError for a model without
    longrope, or if the user sets a factor or an original length.
    """
    current = full_attention_parameters(config)
    if current["rope_type"] != "longrope":
        raise UserError(
            "rope_type=longrope is only for models that already have it, because its factors are found by a search for each "
            "model (arXiv:2402.13753); choose yarn"
        )
    if factor is not None or original_length is not None:
        raise UserError("rope_type=longrope keeps the model's own window; remove rope_factor and rope_original_length")
    scaled = config.max_position_embeddings > current["original_max_position_embeddings"]
    current["short_factor"] = current["long_factor"] = list(current["long_factor" if scaled else "short_factor"])
    return _accepted_by_transformers(config, "longrope")


def _differs_by_layer(config: PretrainedConfig) -> bool:
    return "full_attention" in (config.rope_parameters or {})


def _accepted_by_transformers(config: PretrainedConfig, rope_type: str) -> PretrainedConfig:
    """Return `config` if transformers reads the same RoPE from its config.json (Phi-3 accepts longrope only)."""
    try:
        again = type(config).from_dict(config.to_dict())
        same = again.rope_parameters == config.rope_parameters
    except (ValueError, KeyError, StrictDataclassError):
        same = False
    if not same or again.max_position_embeddings != config.max_position_embeddings:
        raise UserError(f"transformers does not support rope_type={rope_type} for {config.model_type} models")
    return config
