"""LoRA (arXiv:2106.09685) in the same loop: frozen matrices, each with a trained product `alpha / rank * B @ A` beside it.

peft's layers (`peft.tuners.lora.Linear`) are inserted into the model while it is on `meta`, so sharding, checkpoints and the
loss treat adapters like any other parameters. docs/results.md lists the dtypes of frozen weights and how the learning rate is
chosen.

On disk an adapter has peft's format (https://huggingface.co/docs/peft/developer_guides/checkpoint): adapter_config.json, and
adapter_model.safetensors with tensors `base_model.model.MODULE.lora_A.weight` `(rank, in)` and `...lora_B.weight`
`(out, rank)`. base.json beside them has the SHA-256 of the base's weight files: an adapter is useless on other weights, and the
name of a model does not identify its weights.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from common.durable_files import start_directory, write_json
from common.errors import UserError
from common.random_bits import hash64, hash64_tensor
from configs.config import Config, LoRA
from distributed.export import write_file
from distributed.process_group import Ranks, read_on_first
from distributed.sharding import flat_parts, local, whole
from model.architectures import NEW_TOKENS, copy_licences, first_new_row
from model.fingerprint import fingerprint_of_sums
from model.language_model import ADAPTER, NEW_ROWS, PackedLanguageModel, new_rows_of, trained_parameters
from model.weight_files import hash_weights
from model.weights import Weights, tensors_of_checkpoint

ALL_LINEAR = "all-linear"
WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
MODELS = Path("artifacts/models")  # where scripts/fetch_base_model.py puts ORGANISATION/NAME, as NAME
PREFIX = "base_model.model."  # peft's files put it before a parameter's name
SIDES = (".lora_A.weight", ".lora_B.weight")


# --- In training ------------------------------------------------------------------------------------------------------


def add_adapters(causal_lm: PreTrainedModel, settings: LoRA, path: str) -> None:
    """Freeze all parameters and add adapters to the matrices of `settings.targets`, in place.

    The model may be on `meta`; `init_adapters` sets the adapters' values later. `path` is the directory of the base model, which
    peft records. If the base has new tokens, their rows of embedding and head are trained as well. Raises UserError if a target
    is not the name of a matrix inside the layers.
    """
    from peft import inject_adapter_in_model

    config = _peft_config(settings, targets_of(causal_lm, settings.targets), path)
    # On meta peft would draw values on the CPU first, 10 s for a model of 32B.
    is_meta = next(causal_lm.parameters()).is_meta
    inject_adapter_in_model(config, causal_lm, low_cpu_mem_usage=is_meta)
    for name, parameter in causal_lm.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    if (first := first_new_row(path)) is not None:
        last = first + len(json.loads(Path(path, NEW_TOKENS).read_text(encoding="utf-8"))["tokens"])
        embedding: Any = causal_lm.get_input_embeddings()
        head: Any = causal_lm.get_output_embeddings()
        embedding.token_adapter = rows = NewRows(embedding.weight, first, last)
        embedding.register_forward_hook(rows.embed)
        head.token_adapter = rows if head.weight is embedding.weight else NewRows(head.weight, first, last)


class NewRows(nn.Module):
    """The trained rows of new tokens beside a frozen embedding or head, under peft's name (`trainable_token_indices`)."""

    def __init__(self, weight: torch.Tensor, first: int, last: int) -> None:
        """Copy the rows from `first` up to `last` of `weight`, the frozen embedding or head `(vocabulary, hidden_size)`."""
        super().__init__()
        self.first = first
        self.trainable_tokens_delta = nn.Parameter(weight.detach()[first:last].clone())

    def embed(self, embedding: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Replace the embedding's output at new tokens by the trained rows. A forward hook of the embedding."""
        index = inputs[0] - self.first
        rows = nn.functional.embedding(index.clamp(min=0), self.trainable_tokens_delta)
        scale = embedding._buffers.get("embed_scale")  # Gemma
        return torch.where((index >= 0)[..., None], rows if scale is None else rows * scale.to(rows.dtype), output)


def targets_of(causal_lm: PreTrainedModel, targets: str) -> list[str]:
    """Return the sorted names of the modules that get an adapter, such as `q_proj`. Raises UserError for an unknown name.

    `all-linear` means every matrix except the head, as in peft.
    """
    linear = {
        name.rpartition(".")[2]
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and module is not causal_lm.get_output_embeddings()
    }
    chosen = linear if targets == ALL_LINEAR else {name.strip() for name in targets.split(",")}
    for name in sorted(chosen - linear):
        raise UserError(
            f"lora.targets: the model has no matrix {name!r} in its layers; it has {', '.join(sorted(linear))}"
        )
    return sorted(chosen)


def _peft_config(settings: LoRA, modules: list[str], base: str) -> Any:
    """Return peft's LoraConfig for adapters of the model `base` on the matrices named in `modules`."""
    from peft import LoraConfig

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=settings.rank,
        lora_alpha=settings.effective_alpha,  # pyright: ignore[reportArgumentType]  # peft accepts floats: it only divides it
        lora_dropout=settings.dropout,
        bias="none",
    )
    config.target_modules = modules  # set afterwards to keep the order on disk: LoraConfig turns it into a set
    return config


def init_adapters(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """Draw A and set B to zero, in place, so that the model equals the base model. Ignores parameters that are not adapters.

    A is uniform in +-1 / sqrt(columns), which is peft's Kaiming initialisation. Each element is a function of the seed, the
    parameter's name and the element's index, so it does not depend on the number of ranks or on the sharding.
    """
    for name, parameter in parameters.items():
        if ".lora_" not in name:
            continue
        flat = local(parameter).view(-1).zero_()
        if ".lora_B." in name:
            continue
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        bound = parameter.shape[1] ** -0.5
        for part, first in flat_parts(parameter, parameter.numel()):
            indices = torch.arange(first, first + len(flat[part]), device=flat.device)
            bits = hash64_tensor(hash64(seed, stream), indices) >> 40 & 0xFFFFFF  # fp32 represents 24 bits exactly
            flat[part] = ((bits + 0.5) * (2**-23) - 1.0) * bound


def save_adapter(directory: Path, model: PackedLanguageModel, config: Config, ranks: Ranks) -> None:
    """Write the adapter of a model to the temporary name of `directory`. The caller publishes it. A collective.

    Raises UserError on all ranks if the adapter cannot be written.
    """
    base = config.model.path
    temporary = read_on_first(lambda: start_directory(directory), ranks)
    tensors = {}
    for name, parameter in trained_parameters(model).items():
        tensor = whole(parameter)
        if ranks.rank == 0:
            tensors[name.replace(f".{ADAPTER}.", ".")] = tensor.cpu()

    def write() -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        adapter = Adapter(Weights(shapes, tensors.__getitem__), config.lora)
        write_adapter(temporary, adapter, Path(base), base, lambda name, tensor: tensor)
        if config.model.rope_type:
            # The base without this RoPE is another model. Without base.json, `base_of_adapter` refuses the adapter.
            (temporary / BASE).unlink()

    read_on_first(write, ranks)


# --- After training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """An adapter: its tensors by peft's names without PREFIX, and the settings of its training."""

    weights: Weights
    settings: LoRA

    @property
    def modules(self) -> list[str]:
        """The names of the matrices that have an adapter, without `.weight`."""
        names = self.weights.shapes
        return sorted({name.removesuffix(side) for name in names for side in SIDES if name.endswith(side)})


def adapter_of_checkpoint(checkpoint: Path, settings: LoRA) -> Adapter:
    """Return the adapter in a checkpoint of a LoRA run."""
    stored = tensors_of_checkpoint(checkpoint)
    keys = {name.replace(f".{ADAPTER}.", "."): name for name in stored.shapes}
    shapes = {name: stored.shapes[key] for name, key in keys.items()}
    return Adapter(Weights(shapes, lambda name: stored.read(keys[name])), settings)


def merge(base: Weights, adapter: Adapter, base_dtype: torch.dtype | None = None) -> Weights:
    """Return the base's weights with each adapter added to its matrix in fp32 (`alpha / rank * B @ A`), and with trained new rows.

    `base_dtype` is the dtype of the frozen base in training; None keeps the stored dtype.
    """
    adapted = {f"{module}.weight": module for module in adapter.modules}
    assert adapted.keys() <= base.shapes.keys()
    scale = adapter.settings.effective_alpha / adapter.settings.rank

    def read(name: str) -> torch.Tensor:
        weight = base.read(name)
        weight = weight if base_dtype is None else weight.to(base_dtype)
        if (new := new_rows_of(name)) in adapter.weights.shapes:
            rows = adapter.weights.read(new)
            return torch.cat([weight[: -len(rows)].float(), rows.float()])  # new tokens are the last ones
        if name not in adapted:
            return weight
        a, b = (adapter.weights.read(adapted[name] + side).float() for side in SIDES)
        return weight.float() + b @ a * scale

    return Weights(base.shapes, read, base.vocabulary)


def write_adapter(
    folder: Path, adapter: Adapter, base: Path, base_name: str, convert: Callable[[str, torch.Tensor], torch.Tensor]
) -> int:
    """Write the adapter in the format of peft's `PeftModel.from_pretrained`. Return the size of its tensors in bytes.

    `base` is the directory of the weights that the adapter was trained on. `base_name` is the hub id or directory by which peft
    will find them. `convert` changes the dtype of a tensor.
    """
    tensors = {PREFIX + name: convert(name, adapter.weights.read(name)).contiguous() for name in adapter.weights.shapes}
    write_file(tensors, folder / WEIGHTS)
    config = _peft_config(adapter.settings, sorted({name.rpartition(".")[2] for name in adapter.modules}), base_name)
    rows = {name.split(".")[-3]: tensor for name, tensor in tensors.items() if name.endswith(NEW_ROWS)}
    if rows:
        first = first_new_row(base) or 0
        config.trainable_token_indices = {name: list(range(first, first + len(part))) for name, part in rows.items()}
    config.inference_mode = True
    config.save_pretrained(str(folder))
    copy_licences(base, folder)
    sums = hash_weights(base)
    write_json(folder / BASE, {"fingerprint": fingerprint_of_sums(sums), "files": sums})
    return sum(tensor.nbytes for tensor in tensors.values())


def base_of_adapter(folder: Path) -> Path:
    """Return the directory of the base model that an adapter was trained on. Raises UserError if it has other weights.

    The directory is the path in adapter_config.json, or the one to which scripts/fetch_base_model.py downloads the model.
    """
    try:
        name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        recorded = json.loads((folder / BASE).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} is an adapter that does not say which weights it was trained on ({BASE}); export it again with "
            "scripts/export.py"
        ) from None
    places = Path(name), MODELS / Path(name).name
    base = next((place for place in places if (place / "config.json").is_file()), None)
    if base is None:
        raise UserError(f"{folder} is an adapter on {name}, which is not there; put the base into {places[1]}")
    if fingerprint_of_sums(hash_weights(base)) != recorded:
        raise UserError(
            f"{folder} is an adapter on other weights than those in {base} (SHA-256 {recorded[:12]}..., in its {BASE}); put the "
            "weights there that it was trained on, or merge them where they are (scripts/export.py --merge-lora)"
        )
    return base
