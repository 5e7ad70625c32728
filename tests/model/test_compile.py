"""Compiled layers: the number of graphs, the tensors kept for backward, and equality with eager code.

The backend `aot_eager` traces and partitions forward and backward like inductor, and runs the operators of eager code.
"""

import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._inductor.config

from common.errors import UserError
from data.batches import MicroBatch, collate
from distributed import activation_checkpointing
from distributed.activation_checkpointing import checkpoint_activations
from distributed.compiled_layers import compile_layers
from distributed.context import pretended_context
from distributed.sharding import decoder_layers
from model import packed_attention
from model.packed_attention import DocumentLengths
from tests.losses import loss_of
from tests.model.test_equivalence import documents, load
from tests.tiny import write_tiny_model

LENGTHS = (37, 5, 90, 2, 61)
COMPILER = shutil.which("g++") or shutil.which("clang++")  # on a CPU, inductor generates C++


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def of(path, mode: str, is_compiled: bool, **options: str) -> torch.nn.Module:
    model = load(path, torch.float32).train()
    checkpoint_activations(decoder_layers(model), mode)
    if is_compiled:
        compile_layers(decoder_layers(model), **{"backend": "aot_eager"} | options)
    return model


def batch_of(lengths, seed: int = 0) -> MicroBatch:
    return collate(tuple(range(len(lengths))), documents(list(lengths), seed))


def gradients(model: torch.nn.Module, batch: MicroBatch) -> list[torch.Tensor]:
    model.zero_grad()
    loss_of(model, batch).backward()
    return [parameter.grad for parameter in model.parameters()]


def equal_gradients(compiled: torch.nn.Module, eager: torch.nn.Module, batch: MicroBatch) -> None:
    for ours, expected in zip(gradients(compiled, batch), gradients(eager, batch), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_micro_batches_and_evaluation_reuse_the_first_graphs(tmp_path) -> None:
    """Each kind of layer has a graph for training and a graph for evaluation, for all lengths."""
    path, rng = write_tiny_model(tmp_path / "model", family="gemma2", layers=3), np.random.default_rng(0)
    compiled, eager = (of(path, "selective", is_compiled) for is_compiled in (True, False))
    kinds = len({layer.self_attn.sliding_window for layer in decoder_layers(compiled)})
    counts = []
    for seed in range(4):
        batch = batch_of(rng.integers(2, 70, rng.integers(1, 7)), seed)
        equal_gradients(compiled, eager, batch) if seed % 3 == 0 else gradients(compiled, batch)
        counts.append(graphs())
    assert kinds == 2 and set(counts) == {kinds}
    compiled.eval()
    with torch.no_grad():
        for lengths in (LENGTHS, LENGTHS[1:], (7,), (300, 200)):
            compiled(batch_of(lengths))
    assert graphs() == 2 * kinds


@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
def test_what_inductor_writes_computes_the_same(tmp_path) -> None:
    path, batch = write_tiny_model(tmp_path / "model", family="qwen2", tied=False, vocab_size=391), batch_of(LENGTHS)
    eager, compiled = of(path, "full", is_compiled=False), of(path, "full", is_compiled=True, backend="inductor")
    with torch._inductor.config.patch(compile_threads=1):  # a pool of processes would outlive the test
        compiled_gradients = gradients(compiled, batch)
    for ours, expected in zip(compiled_gradients, gradients(eager, batch), strict=True):
        assert (ours - expected).norm() < 1e-5 * expected.norm()
    gradients(compiled, batch_of(LENGTHS[1:]))
    assert graphs() == 1


def kept_bytes(model: torch.nn.Module, batch: MicroBatch) -> int:
    """Return the bytes that forward keeps for backward, without parameters.

    The cache of eager selective checkpointing is not counted.
    """
    parameter_storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(batch)
    del hidden
    return sum(size for pointer, size in kept.items() if pointer not in parameter_storages)


def test_compiled_checkpoints_keep_the_tensors_of_their_mode(tmp_path) -> None:
    """`full` keeps the layers' inputs. `selective` also keeps the results of seven products and of attention.

    Both have the gradients of eager code and a single graph for all lengths.
    """
    path, lengths, layers = write_tiny_model(tmp_path / "model", layers=3), (300, 200), 3
    plain = of(path, "none", is_compiled=False)
    eager = {mode: kept_bytes(of(path, mode, is_compiled=False), batch_of(lengths)) for mode in ("none", "full")}
    kept = {}
    for mode in ("selective", "full"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compiled = of(path, mode, is_compiled=True)
        kept[mode] = kept_bytes(compiled, batch_of(lengths))
        for other_lengths in (LENGTHS, (7,)):
            equal_gradients(compiled, plain, batch_of(other_lengths))
        assert graphs() == 1
    config = load(path).causal_lm.config
    hidden, queries, keys = (config.hidden_size, *(n * config.head_dim for n in (4, 2)))
    token = layers * 4 * (queries + 2 * keys + queries + hidden + 2 * config.intermediate_size)  # fp32
    assert kept["selective"] - kept["full"] == sum(lengths) * token
    rope = 2 * 4 * config.head_dim * sum(lengths)  # RoPE is an argument of an eager checkpoint, which no hook sees
    assert eager["full"] + rope <= kept["full"] < eager["full"] + rope + 200
    assert kept["selective"] < eager["none"]


def test_uncompiled_layers_are_an_error(tmp_path) -> None:
    model = of(write_tiny_model(tmp_path / "model", layers=1), "full", is_compiled=True)
    with torch.compiler.set_stance("force_eager"), pytest.raises(UserError, match="leaves the layers to Python"):
        model(batch_of(LENGTHS))


def test_compiler_sees_context_size_as_a_constant() -> None:
    """If the size were a symbol, all later shapes would be expressions, and compilation would take several times as long."""
    symbols = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        symbols.append([value for value in inputs if not isinstance(value, torch.Tensor)])
        return graph.forward

    to_heads = torch.compile(lambda context, x: context.to_heads(x), dynamic=True, fullgraph=True, backend=backend)
    assert to_heads(pretended_context(2), torch.ones(1, 4, 6, 8)).shape == (1, 2, 12, 8)
    assert [len(value) for value in symbols] == [3]  # the sizes of x: heads, tokens, head_dim


def test_offload_moves_only_inputs_of_compiled_layers(tmp_path, monkeypatch) -> None:
    path, batch, moved = write_tiny_model(tmp_path / "model"), batch_of(LENGTHS), []
    to_host = activation_checkpointing._to_host

    def record(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(to_host(tensor))
        return moved[-1]

    monkeypatch.setattr(activation_checkpointing, "_to_host", record)
    eager, model = of(path, "none", is_compiled=False), of(path, "offload", is_compiled=True)
    activation_checkpointing.keep_inputs_on_host(decoder_layers(model))
    loss = loss_of(model, batch)
    assert [tuple(tensor.shape) for tensor in moved] == [(1, sum(LENGTHS), 64)] * 2 and graphs() == 1
    loss.backward()
    for ours, expected in zip(model.parameters(), gradients(eager, batch), strict=True):
        torch.testing.assert_close(ours.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window, softcap", [(None, None), (30, None), (30, 2.0)])
def test_the_operator_computes_what_eager_attention_does(monkeypatch, dtype, window, softcap) -> None:
    """The output is bitwise equal. Gradients of key and value differ by the order of sums over chunks of queries."""
    monkeypatch.setattr(packed_attention, "CHUNK_QUERIES", 16)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(LENGTHS), heads, 16) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    boundaries = DocumentLengths(LENGTHS, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32))
    eager, _ = packed_attention.packed_attention(None, *tensors, None, 0.25, boundaries, window, softcap)
    arguments = (*tensors, boundaries.ends, 0.25, window, softcap)
    ours = torch.ops.packed.attention(*arguments)
    assert torch.equal(ours, eager)
    weights = torch.randn(eager.shape, generator=generator).to(dtype)
    expected, gradients = (torch.autograd.grad(output, tensors, weights) for output in (eager, ours))
    for gradient, reference in zip(gradients, expected, strict=True):
        bound = 1e-6 if dtype == torch.float32 else 2**-8
        assert (gradient - reference).abs().max() <= bound * reference.abs().max()
    if window is None and softcap is None:
        assert all(torch.equal(gradient, reference) for gradient, reference in zip(gradients, expected, strict=True))
    if dtype == torch.float32:
        torch.library.opcheck(torch.ops.packed.attention.default, arguments)
