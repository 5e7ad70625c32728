"""Bytes that a step moves through a device's memory beside its products and attention: what is elementwise, and copies.

Each figure counts the tensors that the operations of this code read and write. What a product reads and writes is part of its
efficiency (planner/step_time.py).
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from common.dtypes import DTYPES
from configs.config import Config
from distributed.optimizer import parameter_dtype
from model.loss import CHUNK_TOKENS

# optimizer.memory -> bytes of a weight, its gradient, its two moments (distributed/optimizer.py)
STATE_BYTES = {"16N": (4, 4, 8), "14N": (2, 4, 8), "12N": (2, 2, 8), "8N": (2, 2, 4), "6N": (2, 2, 2)}


@dataclass(frozen=True)
class Widths:
    """Elements per token in a decoder layer."""

    hidden: int
    queries: int
    keys_and_values: int
    intermediate: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Widths":
        """The widths of a model."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return cls(config.hidden_size, heads * head_dim, 2 * kv_heads * head_dim, intermediate)


def layer_elements(config: PretrainedConfig, is_compiled: bool) -> float:
    """Elements per token that the forward of a decoder layer reads and writes outside of its products.

    Eager: two norms that compute in fp32 (16 each, in elements of bf16), two residual additions (3 each), RoPE (10 for
    each element of queries and keys), attention (1 each), SiLU and gate (5 for each intermediate element). Compiled: each
    group reads its inputs and writes its outputs once.
    """
    widths = Widths.of(config)
    rotated = widths.queries + widths.keys_and_values / 2
    attention = 2 * widths.queries + widths.keys_and_values
    if is_compiled:
        return 8 * widths.hidden + 2 * rotated + attention + 3 * widths.intermediate
    return (2 * 16 + 2 * 3) * widths.hidden + 10 * rotated + attention + 5 * widths.intermediate


def layers_bytes(
    config: Config, model: PretrainedConfig, layers: int, recomputed: float, adapter_outputs: int = 0
) -> tuple[float, float]:
    """(forward, backward) bytes per token in all layers. recomputed: share of the layers whose forward runs twice.

    adapter_outputs: elements that LoRA's adapters add to the outputs of matrices. They are scaled (2), then added (3).

    Backward moves twice what forward does: it reads what was kept and the gradients, and writes gradients.
    """
    size = DTYPES[config.model.compute_dtype].itemsize
    forward = (layer_elements(model, config.model.compile) * layers + 5 * adapter_outputs) * size
    return forward, (2 + recomputed) * forward


def head_bytes(model: PretrainedConfig, num_tokens: int, is_trained: bool = True) -> float:
    """Bytes per target of logits and loss (model/loss.py).

    For each logit: written (2), cast to fp32 (2 + 4), log_softmax (8), exp (8), cast back (4 + 2), read by two products (4).
    For each weight of the head and chunk: a part of its gradient is written (2), and added in fp32 (10).
    """
    return 34 * num_tokens + is_trained * 12 * num_tokens * model.hidden_size / CHUNK_TOKENS


def copies_bytes(
    config: Config, parameters: int, trained: int, shards: int, ranks: int, gathers: float, is_cuda: bool
) -> float:
    """Bytes of one micro-batch for FSDP's casts and copies. gathers: how often it gathers all `parameters`.

    trained: how many of the parameters have gradients. Frozen ones have the compute dtype already.

    A gather casts this rank's shard to the compute dtype and copies the gathered tensors out of a buffer. A gradient is
    copied into the buffer of its reduction and added to the shard's gradient. A single CPU rank reduces in place.
    """
    weight = parameter_dtype(config.optimizer.memory).itemsize
    size = DTYPES[config.model.compute_dtype].itemsize
    reduced = DTYPES[config.sharding.reduce_dtype].itemsize
    gather = parameters * (2 * size / shards + (2 * size if shards > 1 else 0)) + trained * (weight - size) / shards
    gradient = size + reduced if ranks > 1 or is_cuda else 0
    return gathers * gather + trained * (gradient + 3 * reduced / shards)


def optimizer_bytes(config: Config) -> float:
    """Bytes per local parameter of one update: norm of the gradients, then AdamW, which reads and writes weight and moments.

    Other memories than 16N convert what is not fp32 in buffers: 4 bytes are written and read before and after.
    """
    weight, gradient, moments = STATE_BYTES[config.optimizer.memory]
    converted = (weight < 4) * 2 + (gradient < 4) + 2 * (moments < 8) * 2
    penalty = 2 * DTYPES[config.ewc.dtype].itemsize + weight + 2 * gradient if config.ewc.strength else 0
    return 2 * weight + 2 * gradient + 2 * moments + 8 * converted + penalty
