"""RoPE scaling: a longer context window, set in the model's config before the model is built.

Every pair of dimensions of a query or key turns with the position at its own frequency. Beyond the trained window the
slow pairs reach angles that the model has never seen, and the loss leaps up. Scaling by a factor brings them back:

- `linear`: every frequency is divided by the factor (position interpolation, arXiv:2306.15595);
- `yarn`: only those of slow pairs are, fast pairs keep telling near tokens apart; and queries and keys are multiplied by
  1 + 0.1 ln(factor), since attention over more tokens is flatter (arXiv:2309.00071);
- `llama3`: slow pairs too, with other bounds and no multiplication (Llama 3.1, arXiv:2407.21783);
- `longrope`: a divisor of its own for each pair, found by search when the model was made (arXiv:2402.13753).

Frequencies are those of transformers (modeling_rope_utils); what it computes from the exported config.json is what was
trained. Set after the model is built they would change nothing.
"""

import copy

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig

from common.errors import UserError

# What a type needs beside rope_theta: the settings of the papers and of Llama 3.1.
STRETCHING = {"linear": {}, "yarn": {}, "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
TYPES = ("default", *STRETCHING, "longrope")
NEITHER_SCALED_NOR_NOT = ("linear", "dynamic")  # config files differ in whether max_position_embeddings is multiplied


def scaled_config(
    config: PretrainedConfig,
    rope_type: str | None,
    factor: float | None = None,
    original_length: int | None = None,
) -> PretrainedConfig:
    """A copy of `config` with RoPE of `rope_type` and a window of `factor` times `original_length` positions.

    rope_type: one of TYPES, or None for the config itself. `default` takes a scaling away. factor: above 1; none for
    `default` and `longrope`. original_length: tokens of the window that the model was trained on before any scaling;
    None: what config.json says. Where RoPE differs by layer type (Gemma 3, OLMo 3) only the full-attention layers are
    scaled, as Gemma 3 itself was: the others never look beyond their window.
    Raises UserError for values that do not fit each other or the model.
    """
    if rope_type is None:
        if factor is not None or original_length is not None:
            raise UserError(f"rope_factor and rope_original_length need a rope_type: {', '.join(TYPES)}")
        return config
    if rope_type == "dynamic":
        raise UserError(f"rope_type=dynamic is not supported: {WHY_NOT['dynamic']}")
    if rope_type not in TYPES:
        raise UserError(f"rope_type must be one of {', '.join(TYPES)}, not {rope_type!r}")
    config = copy.deepcopy(config)
    if _rotates_windows_only(config):
        raise UserError(
            f"{config.model_type} rotates queries and keys in its sliding-window layers alone, which never look further "
            f"than {config.sliding_window} tokens: leave out rope_type, there is nothing to scale"
        )
    if rope_type == "longrope":
        return _fixed_longrope(config, factor, original_length)
    own, trained = global_parameters(config), trained_length(config)
    original = trained if original_length is None else original_length
    if original is None:
        raise UserError(
            f"the model has RoPE type {own['rope_type']} and does not say how long its window was before: give "
            "rope_original_length"
        )
    if not 0 < original <= (trained or config.max_position_embeddings):
        raise UserError(
            f"rope_original_length={original_length} does not lie between 1 and the "
            f"{trained or config.max_position_embeddings} positions that the model was trained on"
        )
    kept = {key: own[key] for key in ("rope_theta", "partial_rotary_factor") if own.get(key) is not None}
    if rope_type == "default":
        if factor is not None:
            raise UserError(f"rope_type=default scales nothing, so it has no rope_factor, but rope_factor={factor:g}")
        _set_parameters(config, kept | {"rope_type": "default"}, original)
        return _checked(config, rope_type)
    if factor is None or not 1 < factor < float("inf"):
        raise UserError(f"rope_type={rope_type} needs a rope_factor above 1, not {factor}")
    window = round(factor * original)
    if trained is not None and window <= trained:
        raise UserError(
            f"rope_factor={factor:g} x rope_original_length={original} is {window} positions, not more than the {trained} "
            "that the model was trained on"
        )
    settings = {"rope_type": rope_type, "factor": float(factor)} | STRETCHING[rope_type]
    if rope_type != "linear":
        settings["original_max_position_embeddings"] = original
    _set_parameters(config, kept | settings, window)
    return _checked(config, rope_type)


def global_parameters(config: PretrainedConfig) -> dict:
    """The RoPE settings of the model's layers, of the full-attention ones where they differ by layer type."""
    parameters = config.rope_parameters
    return parameters["full_attention"] if _differs_by_layer(config) else parameters


def trained_length(config: PretrainedConfig) -> int | None:
    """Positions of the window before any scaling; None where config.json does not tell."""
    own = global_parameters(config)
    if own["rope_type"] in NEITHER_SCALED_NOR_NOT:
        return None
    return own.get("original_max_position_embeddings") or config.max_position_embeddings


def check_length(sequence_length: int, config: PretrainedConfig, path: str) -> None:
    """Raise UserError where a packed row could hold a document longer than the model's (scaled) window."""
    window = config.max_position_embeddings
    if sequence_length > window:
        own = global_parameters(config)
        scaled = "" if own["rope_type"] == "default" else f", as scaled by {own['rope_type']}"
        raise UserError(
            f"data.sequence_length={sequence_length} is beyond the {window} positions of {path}{scaled}; shorten it, or "
            "stretch the window with model.rope_type=yarn and a model.rope_factor (docs/long_context.md)"
        )


WHY_NOT = {
    "dynamic": "it takes its frequencies from the longest document in a micro-batch, which breaks the isolation of packed "
    "documents; choose yarn (model.rope_type=yarn with a model.rope_factor)",
    "longrope": "its short and long factors differ, and the longest document in a micro-batch decides between them, which "
    "breaks the isolation of packed documents; set model.rope_type=longrope, which fixes the long ones for all lengths",
}


def check_isolates(config: PretrainedConfig) -> None:
    """Raise UserError for RoPE whose frequencies depend on what a document is packed with."""
    parts = config.rope_parameters or {}
    for part in parts.values() if _differs_by_layer(config) else (parts,):
        kind = (part or {}).get("rope_type")
        if kind == "dynamic" or (kind == "longrope" and part["short_factor"] != part["long_factor"]):
            raise UserError(f"the model has RoPE type {kind}: {WHY_NOT[kind]}")


def fix_frequencies(model: nn.Module) -> None:
    """Have longrope keep the frequencies that it was built with: its factors are equal, so nothing is to choose.

    transformers would look at every forward's positions all the same: 5.17 waits for the device to do so, and
    frequencies that are computed anew on a GPU differ from those of the CPU in the last bit.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = "default"


def _fixed_longrope(config: PretrainedConfig, factor: float | None, original_length: int | None) -> PretrainedConfig:
    """The model's own longrope with one set of factors for documents of any length, in training and after export."""
    own = global_parameters(config)
    if own["rope_type"] != "longrope":
        raise UserError(
            "rope_type=longrope is for models that come with it: its factors are searched for each model "
            "(arXiv:2402.13753); choose yarn"
        )
    if factor is not None or original_length is not None:
        raise UserError(
            "rope_type=longrope takes the model's own window; leave out rope_factor and rope_original_length"
        )
    scaled = config.max_position_embeddings > own["original_max_position_embeddings"]
    own["short_factor"] = own["long_factor"] = list(own["long_factor" if scaled else "short_factor"])
    return _checked(config, "longrope")


def _set_parameters(config: PretrainedConfig, parameters: dict, window: int) -> None:
    if _differs_by_layer(config):
        parameters = config.rope_parameters | {"full_attention": parameters}
    config.rope_parameters = parameters
    config.max_position_embeddings = window


def _differs_by_layer(config: PretrainedConfig) -> bool:
    return "full_attention" in (config.rope_parameters or {})


def _rotates_windows_only(config: PretrainedConfig) -> bool:
    """Cohere 2 and the larger EXAONE 4 have no positions at all in their full-attention layers."""
    return config.model_type in ("cohere2", "exaone4") and bool(getattr(config, "sliding_window", None))


def _checked(config: PretrainedConfig, rope_type: str) -> PretrainedConfig:
    """The config, if transformers reads from its config.json what was set (Phi-3 takes longrope alone)."""
    try:
        again = type(config).from_dict(config.to_dict())
        same = again.rope_parameters == config.rope_parameters
    except (ValueError, KeyError, StrictDataclassError):
        same = False
    if not same or again.max_position_embeddings != config.max_position_embeddings:
        raise UserError(f"transformers does not take rope_type={rope_type} for {config.model_type} models")
    return config
