"""torch.compile of each decoder layer, around its activation checkpointing and inside of FSDP's hooks."""

import logging

import torch
import torch._dynamo
from torch import nn

from common.errors import UserError

# Kinds of layers (with or without a window, checkpointed or not, the first with a frozen embedding before it), each for training
# and for evaluation: 12 at most today.
GRAPHS = 32


def compile_layers(layers: list[nn.Module], backend: str = "inductor") -> None:
    """Compile the forward of each of `layers`, in place. Layers of one kind share their compiled code.

    The compiler sees the checkpoint itself: torch.utils.checkpoint around compiled code would switch it off below. Each layer
    is one graph (an error says what cannot be one), and lengths are symbols, so that other micro-batches use the same code.
    A forward raises UserError where torch.compile has left a layer to Python (TORCH_COMPILE_DISABLE).
    """
    if any(hasattr(module, "top_k") for layer in layers for module in layer.modules()):
        raise UserError("model.compile=True: layers with experts are not compiled; set model.compile=False")
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    # A layer's numbers (scales, eps) never change. Without this torch traces forward and backward twice to find that out.
    torch._dynamo.config.specialize_float = True
    # It warns of operators in place inside of a checkpoint with a policy; the models' layers have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for layer in layers:
        layer.forward = torch.compile(_only_compiled(layer.forward), fullgraph=True, dynamic=True, backend=backend)


def _only_compiled(forward):  # noqa: ANN001, ANN202
    def compiled_forward(*arguments: object, **options: object) -> object:
        if not torch.compiler.is_compiling():  # True while the compiler reads this line: it is not in compiled code
            raise UserError(
                "model.compile=True, but torch.compile leaves the layers to Python; unset TORCH_COMPILE_DISABLE and "
                "TORCHDYNAMO_DISABLE, or set model.compile=False"
            )
        return forward(*arguments, **options)

    return compiled_forward
