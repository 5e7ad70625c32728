"""The activations of a micro-batch, counted on fake tensors: equal to those of a real forward, and to a closed form."""

import gc

import pytest
import torch
from transformers import LlamaConfig

from distributed.activation_checkpointing import checkpoint_activations
from distributed.sharding import decoder_layers
from model.activations import count_activations, layer_kinds, run_layers
from model.architectures import read_model_config
from model.language_model import PackedLanguageModel, build_on_meta, load_weights
from model.packed_attention import DocumentLengths
from tests.tiny import write_tiny_model

LENGTHS = (150, 40, 7)
FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3", "olmo2", "smollm3")  # three of them with sliding windows
LLAMA = LlamaConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=1000,
    max_position_embeddings=8192,
)


def load(path: str, dtype: torch.dtype) -> PackedLanguageModel:
    model = build_on_meta(read_model_config(path)).to(dtype)
    load_weights(model, path, torch.device("cpu"))
    return model


def hidden_states(model: PackedLanguageModel) -> torch.Tensor:
    total = sum(LENGTHS)
    return model.causal_lm.base_model(
        input_ids=torch.zeros(1, total, dtype=torch.int64),
        position_ids=torch.arange(total)[None],
        use_cache=False,
        documents=DocumentLengths(LENGTHS, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)),
    ).last_hidden_state


def bytes_of_saved_tensors(model: PackedLanguageModel) -> int:
    """What autograd keeps of a real forward, each storage once and parameters not."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # alive, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model)
    return sum(storage.nbytes() for storage in kept.values())


def allocated_by_forward(model: PackedLanguageModel) -> int:
    """Bytes that the CPU's allocator has given out in a real forward, and not got back at its end."""
    gc.collect()  # not while the profile counts what is freed
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        loss = hidden_states(model).sum()
    del loss
    return sum(event.nbytes() for event in run.profiler.kineto_results.events() if event.name() == "[memory]")


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("family", "dtype"), [*((f, BF16) for f in FAMILIES), ("llama", FP32), ("gemma3_text", FP32)])
def test_as_many_bytes_as_autograd_saves_in_a_real_forward(tmp_path, family, dtype) -> None:
    path = str(write_tiny_model(tmp_path / "model", family))
    counted = count_activations(read_model_config(path), dtype, LENGTHS)
    assert counted.saved == pytest.approx(bytes_of_saved_tensors(load(path, dtype)), rel=1e-3)
    assert counted.on_host == 0


@pytest.mark.parametrize(
    ("family", "mode", "every"),
    [
        *((family, mode, 1) for family in FAMILIES for mode in ("full", "selective")),
        ("llama", "offload", 1),
        ("phi3", "full", 2),
    ],
)
def test_as_many_bytes_as_a_real_checkpointed_forward_leaves_allocated(tmp_path, family, mode, every) -> None:
    path = str(write_tiny_model(tmp_path / "model", family))
    model = load(path, torch.bfloat16)
    checkpoint_activations(decoder_layers(model)[::every], mode)
    real = allocated_by_forward(model)
    counted = count_activations(read_model_config(path), torch.bfloat16, LENGTHS, mode=mode, every=every)
    assert counted.saved == pytest.approx(real, rel=0.01)


def test_a_layer_of_llama_keeps_what_a_closed_form_says() -> None:
    """In the manner of Korthikanti et al., arXiv:2205.05198, section 4.1, for T tokens in bf16 on CUDA.

    h: hidden size, a: width of all query heads, k: of all key heads, f: intermediate size. Bytes of a token:

    two norms       fp32 input, its normalised bf16 copy (the product with the weight saves it): 2 (4h + 2h); 2 x 4 of 1/rms
    q, k, v         their input: 2h. q and k after RoPE and v, contiguous for the kernel: 2 (a + 2k)
    attention       output 2a, log-sum-exp 4 of each head; the projection's input is that output
    gate, up        input 2h; both outputs 4f, silu(gate) 2f, the product 2f as input of the last matrix
    """
    h, f, heads, kv_heads = 512, 1408, 8, 2
    a, k = h, h // heads * kv_heads
    per_token = 2 * (4 * h + 2 * h + 4) + 2 * h + 2 * (a + 2 * k) + 2 * a + 4 * heads + 2 * h + 8 * f
    counted = count_activations(LLAMA, torch.bfloat16, (700, 300), "cuda")
    assert counted.kept[0] == pytest.approx(1000 * per_token, rel=0.03)
    # `selective` keeps the layer's input and the outputs of all products and of attention
    products = 2 * (a + 2 * k) + 2 * h + 2 * (2 * f) + 2 * h
    selective = count_activations(LLAMA, torch.bfloat16, (700, 300), "cuda", "selective")
    assert selective.kept[0] == pytest.approx(1000 * (2 * h + products + 2 * a + 4 * heads), rel=0.03)
    full = count_activations(LLAMA, torch.bfloat16, (700, 300), "cuda", "full")
    assert full.kept == (1000 * 2 * h,) * 8
    # one layer again, and the gradients of its tensors and weights
    assert counted.kept[0] < full.in_backward[0] < 2.5 * counted.kept[0]


def test_the_kernel_of_cuda_keeps_the_same_for_any_lengths() -> None:
    long, short = (count_activations(LLAMA, torch.bfloat16, lengths, "cuda") for lengths in ((2048,), (16,) * 128))
    assert long.saved == pytest.approx(short.saved, rel=1e-3)
    cpu = [count_activations(LLAMA, torch.bfloat16, lengths).kept[0] for lengths in ((1024,), (512, 512))]
    assert cpu[1] > 1.2 * cpu[0]  # probabilities of short documents are kept there


def test_every_kth_layer_is_checkpointed_and_offload_leaves_the_device() -> None:
    plain = count_activations(LLAMA, torch.bfloat16, (100,), "cuda")
    every = count_activations(LLAMA, torch.bfloat16, (100,), "cuda", "full", every=3)
    layer_input = 100 * 512 * 2
    assert every.kept == tuple(layer_input if index % 3 == 0 else plain.kept[0] for index in range(8))
    offload = count_activations(LLAMA, torch.bfloat16, (100,), "cuda", "offload", every=3)
    assert offload.on_host == 3 * layer_input and offload.kept[0] == 0 and offload.kept[1] == plain.kept[0]
    assert offload.in_backward[0] == every.in_backward[0] + layer_input
    assert plain.scaled(3).saved == pytest.approx(
        count_activations(LLAMA, torch.bfloat16, (300,), "cuda").saved, rel=1e-3
    )


def test_layers_of_one_kind_are_counted_once(tmp_path) -> None:
    config = read_model_config(str(write_tiny_model(tmp_path / "model", "gemma3_text")))
    assert len(set(layer_kinds(config, "none", 1))) == 2
    assert len(set(layer_kinds(LLAMA, "none", 1))) == 1 and len(set(layer_kinds(LLAMA, "full", 2))) == 2


def test_parameters_are_not_counted(tmp_path) -> None:
    """Attention in fp32 keeps as much for each token of a longer document, so twice the tokens keep twice the bytes."""
    model = load(str(write_tiny_model(tmp_path / "model")), torch.float32)
    layers = decoder_layers(model)
    one, two = (run_layers(model, layers, (length,)).saved for length in (100, 200))
    assert two == pytest.approx(2 * one, rel=1e-3)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_selective_keeps_no_scores_of_softcapped_attention(tmp_path, device_type) -> None:
    """What a layer keeps is linear in the length of a document; its scores would be quadratic."""
    config = read_model_config(str(write_tiny_model(tmp_path / "model", family="gemma2")))
    assert config.attn_logit_softcapping
    short, long = (
        count_activations(config, torch.bfloat16, (length,), device_type, "selective").kept[0] for length in (256, 1024)
    )
    assert long == pytest.approx(4 * short, rel=0.01)
