"""A model directory with the first decoder layers of another one, at full width: real weights where they are there."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from common.durable_files import write_json
from common.errors import UserError
from model.architectures import check_model_directory
from model.weight_files import INDEX, SINGLE, stored_tensors

NOTE_FILE = "layers.json"  # what was cut, for those who report on the model
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
COPIED_BYTES = 200_000_000  # a larger file is no tokenizer
FALLBACK_DTYPE = "bfloat16"  # of random weights, if config.json names none


def cut_model(path: str | Path, layers: int, out: str | Path) -> str:
    """Write the first `layers` decoder layers of the model in `path`, with embedding, norm and head, to `out`.

    Only the tensors that are needed are read. A directory without weights (config.json and tokenizer only) gets random initial
    weights. Returns a sentence about it for the report. Raises UserError if `path` is no model directory or damaged.
    """
    path, out = Path(path), Path(out)
    check_model_directory(path)
    out.mkdir(parents=True, exist_ok=True)
    settings = _read_config(path)
    of = settings["num_hidden_layers"]
    kept = min(layers, of)
    write_json(out / "config.json", cut_config(settings, kept))
    for file in sorted(path.iterdir()):
        is_other = file.name in ("config.json", INDEX) or file.suffix in WEIGHTS
        if file.is_file() and not is_other and file.stat().st_size <= COPIED_BYTES:
            shutil.copyfile(file, out / file.name)
    has_weights = (path / SINGLE).is_file() or (path / INDEX).is_file()
    if has_weights:
        _copy_tensors(path, kept, out)
    else:
        _write_random(out)
    write_json(out / NOTE_FILE, {"layers": kept, "of": of, "random": not has_weights})
    return note(out) or ""


def note(directory: str | Path) -> str | None:
    """What was cut, as a sentence for the report; None for a model that was not cut."""
    file = Path(directory, NOTE_FILE)
    if not file.is_file():
        return None
    cut = json.loads(file.read_text(encoding="utf-8"))
    what = "random initial weights, so losses and updates are not those of the run" if cut["random"] else "real weights"
    return f"the first {cut['layers']} of {cut['of']} decoder layers at full width, {what}"


def cut_config(settings: dict, layers: int) -> dict:
    """config.json with fewer layers. What is listed layer by layer (layer_types, no_rope_layers) is cut as well."""
    of = settings["num_hidden_layers"]
    cut = {
        key: value[:layers] if isinstance(value, list) and len(value) == of and _is_by_layer(key) else value
        for key, value in settings.items()
    }
    cut["num_hidden_layers"] = layers
    if isinstance(cut.get("max_window_layers"), int):  # Qwen 2: the layers before it attend to everything
        cut["max_window_layers"] = min(cut["max_window_layers"], layers)
    return cut


def _is_by_layer(key: str) -> bool:
    """Whether a list of the length of the layers is one entry per layer, and not, say, two end tokens of a model of two layers."""
    return "layer" in key


def _read_config(path: Path) -> dict:
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        layers = settings["num_hidden_layers"]
        if not isinstance(layers, int) or layers < 1:
            raise TypeError(f"num_hidden_layers is {layers!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / 'config.json'} names no number of layers ({error!r}); copy the model again"
        ) from error
    return settings


def _copy_tensors(path: Path, layers: int, out: Path) -> None:
    """The needed tensors, one new file for each old one that has some. safetensors maps the files, so others are not read."""
    by_file: dict[Path, list[str]] = {}
    for name, tensor in stored_tensors(path).items():
        found = LAYER.search(name)
        if found is None or int(found[1]) < layers:
            by_file.setdefault(tensor.file, []).append(name)
    if len(by_file) == 1:
        ((file, names),) = by_file.items()
        _copy_file(file, names, out / SINGLE)
        return
    weight_map = {}
    for number, (file, names) in enumerate(sorted(by_file.items()), 1):
        target = f"model-{number:05d}-of-{len(by_file):05d}.safetensors"
        _copy_file(file, names, out / target)
        weight_map |= dict.fromkeys(names, target)
    size = sum(tensor.size for tensor in stored_tensors(path).values() if tensor.file in by_file)
    write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _copy_file(file: Path, names: list[str], target: Path) -> None:
    with safe_open(file, framework="pt") as tensors:
        save_file({name: tensors.get_tensor(name) for name in names}, target, metadata={"format": "pt"})


def _write_random(out: Path) -> None:
    """Initial weights of the cut config, always the same, in the dtype of its config."""
    config = AutoConfig.from_pretrained(out)
    dtype = config.dtype or FALLBACK_DTYPE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        )
    model.save_pretrained(out)
