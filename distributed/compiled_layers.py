"""torch.compile of each decoder layer, around its activation checkpointing and inside of FSDP's hooks."""

import logging

import torch
import torch.compiler.config
from torch import nn

from common.errors import UserError
from common.torch_private import private

private("_dynamo.config.specialize_float")
_compiler = private("_dynamo.config")
# The compiler's limit of graphs. At most 12 are needed: one for each kind of layer (with or without a window, checkpointed or not,
# the first layer behind a frozen embedding) in training and in evaluation.
GRAPHS = 32


def compile_layers(layers: list[nn.Module], backend: str = "inductor") -> None:
    """Compile the forward of each layer, in place. Layers of the same kind share their compiled code.

    The compiled code includes the activation checkpointing, because torch.utils.checkpoint disables the compiler inside itself.
    Each layer is a single graph (torch raises an error otherwise), and lengths are symbols, so that micro-batches of other
    lengths use the same code. Raises UserError for layers with experts. A forward raises UserError if torch.compile does not
    compile (TORCH_COMPILE_DISABLE).
    """
    if any(hasattr(module, "top_k") for layer in layers for module in layer.modules()):
        raise UserError("model.compile=True: layers with experts are not compiled; set model.compile=False")
    torch.compiler.config.recompile_limit = max(GRAPHS, torch.compiler.config.recompile_limit)
    # A layer's floats (scales, eps) are constants. Without this, torch traces forward and backward twice to find that out.
    _compiler.specialize_float = True
    # torch warns of in-place operators inside a checkpoint with a policy. The models' layers have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for layer in layers:
        layer.forward = torch.compile(_only_compiled(layer.forward), fullgraph=True, dynamic=True, backend=backend)


def _only_compiled(forward):  # noqa: ANN001, ANN202
    def compiled_forward(*arguments: object, **options: object) -> object:
        if not torch.compiler.is_compiling():  # True while the compiler traces, so that compiled code has no such check
            raise UserError(
                "model.compile=True, but torch.compile leaves the layers to Python; unset TORCH_COMPILE_DISABLE and "
                "TORCHDYNAMO_DISABLE, or set model.compile=False"
            )
        return forward(*arguments, **options)

    return compiled_forward
