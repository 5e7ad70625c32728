"""How many bytes of activations a token leaves for backward, counted on fake tensors: no memory, no weights, half a second."""

import copy
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from model.language_model import PackedLanguageModel, build_on_meta

TOKENS = 512  # of the counted document: of this length attention on a CPU keeps most for a token (model/product_attention.py)


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of one token. layer: saved by one decoder layer; layer_input: by a layer that is recomputed in backward."""

    layer: int
    layer_input: int
    rest: int  # by embedding and final norm


def saved_bytes(config: PretrainedConfig, dtype: torch.dtype) -> SavedBytes:
    """Count what autograd keeps of a token's forward in `dtype`, without the head, whose chunks keep little.

    Every storage counts once and parameters do not. Layers of one model are taken to be alike. Attention is that of the CPU,
    which saves its inputs in fp32: on CUDA it is less.
    https://docs.pytorch.org/docs/stable/autograd.html#torch.autograd.graph.saved_tensors_hooks
    """
    one, two = (_count(config, dtype, layers) for layers in (1, 2))
    layer = (two - one) // TOKENS
    return SavedBytes(layer, config.hidden_size * dtype.itemsize, one // TOKENS - layer)


def _count(config: PretrainedConfig, dtype: torch.dtype, layers: int) -> int:
    short = copy.deepcopy(config)
    short.num_hidden_layers = layers
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:layers]
    model = build_on_meta(short).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return saved_by_forward(model, TOKENS)


def saved_by_forward(model: PackedLanguageModel, tokens: int) -> int:
    """Bytes that autograd keeps of a forward over one document up to the head."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # alive, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden_states(_OneDocument(tokens))  # pyright: ignore[reportArgumentType]
    return sum(storage.nbytes() for storage in kept.values())


class _OneDocument:
    """The part of a micro-batch that the layers read."""

    def __init__(self, tokens: int) -> None:
        self.input_ids = torch.zeros(1, tokens, dtype=torch.int64)
        self.position_ids = torch.arange(tokens)[None]
        self.document_lengths = (tokens,)
        self.cu_seq_lens = torch.tensor([0, tokens], dtype=torch.int32)
