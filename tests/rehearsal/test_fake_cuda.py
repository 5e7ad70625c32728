"""What the CUDA path does below autograd, on fake CUDA tensors: no operand of another device, nothing the host waits for."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM

import distributed.low_memory
from common.random_bits import sample_labels
from configs.config import Optimizer
from data.batches import collate
from distributed.gradients import clip_gradients, gradient_norm
from distributed.low_memory import make_code_maps
from distributed.optimizer import adamw, parameter_dtype
from eval.forgetting import visit_documents
from eval.generate import Sampling, greedy_answers, sampled_answers
from model.ewc import Anchor, Penalty, draw
from model.language_model import build_on_meta
from model.loss import HeadSettings, LossSums, chunked
from tests.in_memory import texts
from tests.losses import loss_of, loss_sum
from tests.rehearsal.fake_cuda import CUDA, fake_cuda, on_cuda
from tests.tiny import FAMILIES, OTHER_FAMILIES

MEMORIES = ("16N", "14N", "12N", "8N", "6N")


def config_of(family: str) -> AutoConfig:
    kind, extra = (FAMILIES | OTHER_FAMILIES)[family]
    if "layer_types" in extra:
        extra = extra | {"layer_types": [f"{name}_attention" for name in extra["layer_types"]]}
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return AutoConfig.for_model(kind, **sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=2, **extra)


def make_weights(memory: str) -> dict[str, torch.nn.Parameter]:
    """A matrix of more than one chunk of CUDA, one that ends within a register, and a vector."""
    dtype = parameter_dtype(memory)
    shapes = {"layers.0.large": (3, 2**23), "layers.0.small": (7, 36), "norm": (33,)}
    made = {}
    for name, shape in shapes.items():
        made[name] = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=CUDA))
    return made


def give_gradients(parameters: dict[str, torch.nn.Parameter]) -> None:
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_optimizer_memory_takes_a_step(memory, monkeypatch) -> None:
    if memory == "6N":
        pytest.importorskip("torchao")
        maps = make_code_maps(torch.device("cpu"))  # computed with values, which fake tensors do not have
        monkeypatch.setattr(
            distributed.low_memory, "make_code_maps", lambda device: {key: m.to(device) for key, m in maps.items()}
        )
    with fake_cuda():
        parameters = make_weights(memory)
        optimizer = adamw(parameters, Optimizer(1e-3, memory=memory), seed=0)
        give_gradients(parameters)
        assert parameters["norm"].grad.dtype == (torch.float32 if memory in ("16N", "14N") else torch.bfloat16)
        for group in optimizer.param_groups:
            group["lr"], group["noise_step"] = 1e-3, 0
        gradient_norm(parameters.values())
        clip_gradients(parameters.values(), 1.0, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        for parameter in parameters.values():
            assert parameter.device == CUDA
            assert all(value.device == CUDA for value in optimizer.state[parameter].values())


def test_the_net_catches_a_host_tensor_and_a_wait() -> None:
    with fake_cuda():
        parameters = make_weights("12N")
        give_gradients(parameters)
        with pytest.raises(DataDependentOutputException):
            gradient_norm(parameters.values()).item()
        hidden, head = torch.empty(70, 64, device=CUDA), torch.empty(384, 64, device=CUDA)
        ids = torch.empty(70, dtype=torch.int64, device=CUDA)
        assert loss_sum(hidden, head, ids, weights=torch.empty(70, device=CUDA)).device == CUDA
        with pytest.raises(RuntimeError, match="two (different )?devices"):
            loss_sum(hidden, head, ids, weights=torch.empty(70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_penalty_of_ewc_adds_its_gradient(dtype) -> None:
    with fake_cuda():
        parameters = make_weights("16N" if dtype == torch.float32 else "12N")
        for device in ("device", "cpu"):
            fisher = {name: torch.empty_like(p, dtype=torch.bfloat16) for name, p in parameters.items()}
            anchor = Anchor(fisher, dict(parameters), {})
            give_gradients(parameters)
            penalty = Penalty(1.0, parameters, anchor, device)
            assert penalty.anchor.fisher["norm"].device.type == ("cpu" if device == "cpu" else "cuda")
            for measure in (False, True):
                penalty.add_gradient(0, measure)
            assert penalty.sums.device == CUDA and isinstance(penalty.measured[1], torch.cuda.Event)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("sources", [1, 3])
def test_the_loss_stays_on_the_device(softcap, sources) -> None:
    """Without gradients, which autograd does not compute on fake tensors; test_pretended_gpu.py has them."""
    settings = HeadSettings(scale=0.5, softcap=softcap, num_tokens=380)
    with fake_cuda():
        hidden = torch.empty(70, 64, dtype=torch.bfloat16, device=CUDA)
        head = torch.empty(384, 64, dtype=torch.bfloat16, device=CUDA)
        ids = torch.empty(70, dtype=torch.int64, device=CUDA)
        sums = LossSums(sources, CUDA)
        loss = loss_sum(hidden, head, ids, settings, ids, sums, torch.empty(70, device=CUDA))
        sums.total.add_(loss)
        assert {loss.device, sums.values.device} == {CUDA} and loss.dtype == torch.float32
        assert loss_sum(hidden[:0], head, ids[:0], settings).device == CUDA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_sliding", "gemma2", "gemma3_text", "granite"])
def test_forward_and_validation_of_a_family(family, dtype) -> None:
    """Per document in fp32, by varlen_attn with grouped heads and windows in bf16 (not with the softcap of gemma2)."""
    documents = texts([37, 5, 90, 64])
    batch = collate((0, 1, 2, 3), documents)
    seen = []
    model = build_on_meta(config_of(family)).to(dtype).eval()
    with fake_cuda():
        on_cuda(model)
        moved = batch.to(CUDA)
        tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == 5 and all(isinstance(t, FakeTensor) and t.device == CUDA for t in tensors)
        assert moved.document_lengths == batch.document_lengths
        with _Operators() as operators:
            loss = loss_of(model, moved, LossSums(1, CUDA))
        assert loss.device == CUDA and loss.dtype == torch.float32
        assert ("torch_attn::_varlen_attn" in operators.names) == (dtype == torch.bfloat16 and family != "gemma2")
        visit_documents(model, documents, (0, 1), CUDA, lambda logits, ids, owners: seen.append((logits, ids)))
        assert all(logits.device == ids.device == CUDA for logits, ids in seen) and seen[0][0].shape[1] == 384


def test_weights_of_targets_move_with_their_batch() -> None:
    batch = collate((0, 1), texts([9, 7]))
    object.__setattr__(batch, "target_weights", torch.ones(len(batch.target_ids)))
    with fake_cuda():
        assert batch.to(CUDA).target_weights.device == CUDA


@pytest.mark.parametrize("estimator", ["model", "empirical"])
def test_the_draws_of_the_fisher_diagonal(estimator) -> None:
    batch = collate((0, 1, 2), texts([9, 7, 12]))
    model = build_on_meta(config_of("llama")).to(torch.bfloat16)
    with fake_cuda():
        on_cuda(model)
        moved = batch.to(CUDA)
        drawn, losses = draw(estimator, moved, torch.arange(3, device=CUDA), seed=0)
        assert chunked(model.head, model(drawn), drawn, losses).device == CUDA
        labels = sample_labels(torch.empty(5, 384, device=CUDA), torch.empty(5, dtype=torch.int64, device=CUDA))
        assert labels.device == CUDA


class _Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().partition(".")[0])
        return function(*args, **(kwargs or {}))


class _Read(torch.utils._python_dispatch.TorchDispatchMode):
    """Lets the host read chosen tokens, which generation needs; every value is 3."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 3
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampled", [False, True])
def test_generation_keeps_its_cache_on_the_device(sampled) -> None:
    prompts = [list(range(3, 3 + n)) for n in (40, 25, 31)]  # with a common start that is read once
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("llama")).to(torch.bfloat16).eval()
    with fake_cuda():
        on_cuda(model)
        with _Read():
            if sampled:
                answers = sampled_answers(model, prompts, [0, 1, 2], {2}, 4, Sampling(0.7, 0.9))
            else:
                answers = greedy_answers(model, prompts, {2}, 4, batch_size=2)
    assert answers == [[3, 3, 3, 3]] * 3
