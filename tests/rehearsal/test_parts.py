"""Parts of the CUDA path that no run of test_pretended_gpu.py reaches, on a pretended GPU: families, generation, losses."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from data.batches import collate
from eval.forgetting import visit_documents
from eval.generate import Sampling, greedy_answers, sampled_answers
from model.language_model import build_on_meta
from model.loss import HeadSettings, LossSums
from tests.in_memory import texts
from tests.losses import loss_of, loss_sum
from tests.rehearsal.pretend_device import PretendDevice
from tests.rehearsal.pretended_cuda import pretend_device
from tests.tiny import tiny_config


@pytest.fixture
def gpu():
    with pretend_device() as device:
        torch.backends.cuda.enable_cudnn_sdp(False)  # as choose_device does
        yield device


def on(gpu: PretendDevice, model: nn.Module) -> nn.Module:
    """Allocate a model on `meta` on the device, with arbitrary values."""
    model = model.to_empty(device="cpu").eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(0.01)
        gpu.put(tensor)
    gpu.waits.clear()
    return model


def waits(gpu: PretendDevice) -> list[str]:
    return [f"{what} in {place}" for _, what, place in gpu.waits]


@torch.no_grad()
@pytest.mark.parametrize(
    "family, dtype",
    [
        ("llama", torch.float32),
        ("mistral_sliding", torch.bfloat16),
        ("gemma2", torch.bfloat16),
        ("gemma3_text", torch.bfloat16),
    ],
)
def test_forward_and_validation_of_a_family(gpu, family, dtype) -> None:
    """Attention runs per document in fp32, and in varlen_attn with grouped heads and windows in bf16 (except gemma2's softcap)."""
    documents, seen = texts([37, 5, 90, 64]), []
    batch = collate((0, 1, 2, 3), documents)
    model = on(gpu, build_on_meta(tiny_config(family)).to(dtype))
    moved = batch.to(gpu.place)
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5 and all(t.device == gpu.place for t in tensors)
    assert moved.document_lengths == batch.document_lengths
    gpu.waits.clear()
    loss = loss_of(model, moved, LossSums(1, gpu.place))
    assert loss.device == gpu.place and loss.dtype == torch.float32 and waits(gpu) == []
    assert ("torch_attn::_varlen_attn" in gpu.operators) == (dtype == torch.bfloat16 and family != "gemma2")
    visit_documents(model, documents, (0, 1), gpu.place, lambda logits, ids, owners: seen.append((logits, ids)))
    assert all(logits.device == ids.device == gpu.place for logits, ids in seen) and seen[0][0].shape[1] == 384


@torch.no_grad()
def test_weighted_loss_by_source_stays_on_device(gpu) -> None:
    settings = HeadSettings(scale=0.5, softcap=30.0, num_tokens=380)
    hidden, head = (torch.ones(n, 64, dtype=torch.bfloat16, device="cuda") for n in (70, 384))
    ids, weights = torch.ones(70, dtype=torch.int64, device="cuda"), torch.ones(70, device="cuda")
    sums = LossSums(3, gpu.place)
    sums.total.add_(loss_sum(hidden, head, ids, settings, ids, sums, weights))
    assert sums.values.device == gpu.place
    assert loss_sum(hidden[:0], head, ids[:0], settings).device == gpu.place
    assert waits(gpu) == []
    sums.total.item()  # checks the pretended GPU itself: it records a wait, and refuses a host tensor
    assert waits(gpu)[0].startswith("aten::_local_scalar_dense in ")
    with pytest.raises(RuntimeError, match="expected all tensors on cuda:0"):
        loss_sum(hidden, head, ids, weights=torch.ones(70))


@torch.no_grad()
@pytest.mark.parametrize("sampled", [False, True])
def test_generation_keeps_its_cache_on_the_device(gpu, sampled) -> None:
    prompts = [list(range(3, 3 + n)) for n in (40, 25, 31)]  # with a common prefix that is read once
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama")).to(torch.bfloat16)
    on(gpu, model)
    if sampled:
        answers = sampled_answers(model, prompts, [0, 1, 2], {2}, 4, Sampling(0.7, 0.9))
    else:
        answers = greedy_answers(model, prompts, {2}, 4)
    assert all(1 <= len(answer) <= 4 for answer in answers) and len(answers) == 3
    assert any("scaled_dot_product" in name for name in gpu.operators)
