"""A model of the first decoder layers of another model, at full width, for a check on a machine that cannot hold the whole."""

import json
import re
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from common.durable_files import write_json
from model.weight_files import INDEX, SINGLE, stored_tensors

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
COPIED_BYTES = 200_000_000  # a larger file does not belong to the tokenizer


def cut_model(path: Path, layers: int, out: Path) -> str:
    """Write the first `layers` decoder layers of the model in `path`, with embedding, norm and head, to `out`.

    Read only the tensors that are needed. Return a sentence for the report. Raise UserError if the weights are missing or damaged;
    a single missing tensor is missing in `out` too.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    num_layers = settings["num_hidden_layers"]
    # Cut lists with a value for each layer (layer_types, no_rope_layers), but no other list that happens to be as long.
    for key, value in settings.items():
        if isinstance(value, list) and len(value) == num_layers and "layer" in key:
            settings[key] = value[:layers]
    settings["num_hidden_layers"] = layers
    if isinstance(settings.get("max_window_layers"), int):  # Qwen 2: the layers before it attend to everything
        settings["max_window_layers"] = min(settings["max_window_layers"], layers)
    write_json(out / "config.json", settings)
    tensors = {}
    for name, tensor in stored_tensors(path).items():
        layer = LAYER.search(name)
        if layer is None or int(layer[1]) < layers:
            with safe_open(
                tensor.file, framework="pt"
            ) as file:  # the file is mapped, so that other tensors are not read
                tensors[name] = file.get_tensor(name)
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    for file in path.iterdir():  # the tokenizer, and the settings of generation
        is_kept = file.is_file() and file.suffix not in NOT_COPIED and file.name not in ("config.json", INDEX)
        if is_kept and file.stat().st_size <= COPIED_BYTES:
            shutil.copyfile(file, out / file.name)
    return f"the first {layers} of {num_layers} decoder layers at full width"
