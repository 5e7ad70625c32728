"""Models with experts against transformers' eager code: every gradient, the choice of experts, the auxiliary loss, the files."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from common.errors import UserError
from configs.config import EWC, Batch, Config, Data, LoRA, Model, Optimizer, Run
from data.batches import MicroBatch, collate
from data.dealing import Dealer, length_as_cost
from distributed.activation_checkpointing import checkpoint_activations, tile_mlps
from distributed.compiled_layers import compile_layers
from distributed.optimizer import adamw
from distributed.sharding import decoder_layers, local_shape, sharded_dimension
from model.architectures import read_model_config
from model.build import build_to_train
from model.ewc import start_penalty
from model.experts import Routers
from model.language_model import build_on_meta, check_weights, load_weights
from model.memory import count_activations, shape_of
from model.weight_files import StoredTensor, stored_tensors
from model.weight_names import find_sources
from tests.losses import assert_same_gradients, eager, loss_of
from tests.model.test_equivalence import documents, load
from tests.operators import OperatorHook
from tests.tiny import write_tiny_model

FAMILIES, OTHERS = ("qwen3_moe", "gpt_oss"), ("qwen2_moe", "olmoe")
LENGTHS = [37, 5, 90, 2, 61]
FACTOR = 0.3
PREFIX = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module", params=FAMILIES)
def path(request, tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("experts") / "model", family=request.param, tied=False)


def routers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "top_k")]


def with_scores(path, source, factor: float = 0.0) -> tuple[torch.nn.Module, torch.Tensor, list[torch.Tensor]]:
    """Run transformers' eager model document by document. Return (model with gradients, loss, scores of each layer's router)."""
    parts, register = {}, torch.nn.modules.module.register_module_forward_hook
    hook = register(
        lambda module, _, output: parts.setdefault(module, []).append(output[0]) if hasattr(module, "top_k") else None
    )
    with hook:
        model, total = eager(path, source.ids, source.weights, experts_implementation="eager")
    scores = [torch.cat(parts[router]) for router in routers_of(model)]
    if factor:
        total = total + factor * load_balancing_loss_func(tuple(scores), 6, 2)
    total.backward()
    return model, total.detach(), scores


@pytest.mark.parametrize("mode", ["none", "selective", "tiles"])
@pytest.mark.parametrize("path", [*FAMILIES, *OTHERS], indirect=True)
def test_loss_and_gradients_with_auxiliary_loss_equal_eager(path, ranks, mode) -> None:
    """Includes the routers, in a micro-batch of packed documents, also if backward recomputes layers."""
    source = documents(LENGTHS)
    packed = load(path)
    layers = decoder_layers(packed)
    if mode == "tiles":
        tile_mlps(layers, 3)
    checkpoint_activations(layers, "full" if mode == "tiles" else mode)
    routers = Routers(packed, FACTOR, packed.causal_lm.config, torch.device("cpu"))
    routers.start(SimpleNamespace(document_lengths=tuple(LENGTHS)))
    batch = collate((0, 1, 2, 3, 4), source)
    loss = loss_of(packed, batch)
    loss = loss + routers.loss(batch, True)
    loss.backward()
    theirs, expected, _ = with_scores(path, source, FACTOR)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(packed.causal_lm, theirs, floor=0.0)
    without = with_scores(path, source)[1]
    assert abs(expected.item() - without.item()) > 0.1  # the auxiliary loss is large enough to be seen


def test_auxiliary_loss_of_config_json_equals_transformers(path, tmp_path, ranks) -> None:
    """The whole loss, divided by the targets, for a micro-batch with a single document."""
    shutil.copytree(path, tmp_path / "model")
    config = read_model_config(str(path))
    config.output_router_logits, config.router_aux_loss_coef = True, FACTOR
    config.save_pretrained(tmp_path / "model")
    source, packed = documents([61]), load(tmp_path / "model")
    source.weights[0][1:] = True
    routers = Routers(packed, None, read_model_config(str(tmp_path / "model")), torch.device("cpu"))
    routers.start(SimpleNamespace(document_lengths=(61,)))
    batch = collate((0,), source)
    loss = loss_of(packed, batch) / 60
    loss = loss + routers.loss(batch, True)
    loss.backward()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager", dtype=torch.float32)
    ids = torch.from_numpy(source.ids[0])[None]
    expected = theirs(ids, labels=ids).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(packed.causal_lm, theirs, floor=0.0)


def test_packed_documents_choose_the_same_experts_as_alone(path) -> None:
    source, packed, chosen = documents(LENGTHS), load(path), []
    for router in routers_of(packed):
        router.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    packed(collate((0, 1, 2, 3, 4), source))
    assert packed.causal_lm.config._experts_implementation == "grouped_mm"  # one product for all experts of a layer
    _, _, scores = with_scores(path, source)
    assert len(chosen) == 2
    for ours, theirs in zip(chosen, scores, strict=True):
        assert torch.equal(ours, theirs.topk(2, dim=-1).indices)
        assert len(ours.unique()) == 6


@pytest.mark.parametrize("mode, tiles", [("full", 1), ("full", 3), ("selective", 1)])
def test_backward_under_checkpointing_does_not_choose_again(path, mode, tiles) -> None:
    source, gradients = documents(LENGTHS), []
    for checkpointing in ("none", mode):
        packed = load(path)
        if tiles > 1:
            tile_mlps(decoder_layers(packed), tiles)
        checkpoint_activations(decoder_layers(packed), checkpointing)
        chosen = []
        with OperatorHook(lambda func, *_, to=chosen: to.append(func is torch.ops.aten.topk.default)):
            loss = loss_of(packed, collate((0, 1, 2, 3, 4), source))
            assert sum(chosen) == 2 * tiles
            loss.backward()
        assert sum(chosen) == 2 * tiles
        gradients.append([parameter.grad for parameter in packed.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_auxiliary_loss_uses_all_micro_batches_so_far(path, ranks) -> None:
    """The loss of the second micro-batch uses the choices of both. Probabilities are means over the tokens of the step."""
    source, packed = documents(LENGTHS), load(path)
    routers = Routers(packed, FACTOR, packed.causal_lm.config, torch.device("cpu"))
    routers.start(SimpleNamespace(document_lengths=tuple(LENGTHS)))
    losses = []
    for items, is_last in (((0, 1), False), ((2, 3, 4), True)):
        batch = collate(items, source)
        packed(batch)
        losses.append(routers.loss(batch, is_last).item())
    _, _, scores = with_scores(path, source)
    first, counts = LENGTHS[0] + LENGTHS[1], []
    for part in (slice(0, first), slice(first, None)):
        counts.append(sum(s[part].topk(2, dim=-1).indices.flatten().bincount(minlength=6) for s in scores))
    tokens = sum(LENGTHS)
    for part, loss, count, num_tokens in (
        (slice(0, first), losses[0], counts[0], first),
        (slice(first, None), losses[1], counts[0] + counts[1], tokens),
    ):
        means = sum(s[part].softmax(-1).sum(0) for s in scores) / (2 * tokens)
        assert loss == pytest.approx(FACTOR * 6 * (count / (2 * num_tokens) * means).sum().item(), rel=1e-5)
    curves = routers.curves()
    shares = scores[1].topk(2, dim=-1).indices.flatten().bincount(minlength=6) / (2 * tokens)
    assert curves["router/largest_share/layers_01"] == pytest.approx(shares.max().item())
    entropy = -(shares * shares.log()).sum().item() / math.log(6)
    assert curves["router/entropy/layers_01"] == pytest.approx(entropy, rel=1e-6)
    assert routers.curves()["router/largest_share/layers_01"] == 0.0  # a new window


def test_dense_layers_between_expert_layers_are_planned(tmp_path) -> None:
    """The curves have the layers' own indices. The plan counts both kinds of layers."""
    config = read_model_config(str(write_tiny_model(tmp_path, "qwen3_moe", False, layers=4, mlp_only_layers=[1])))
    packed = build_on_meta(config)
    assert Routers(packed, None, config, torch.device("cpu")).layers == [0, 2, 3]
    kept = count_activations(shape_of(packed, config), Model("", compute_dtype="fp32"), LoRA(), "cpu", (64,)).kept
    assert kept[0] == kept[2] == kept[3] != kept[1]


def test_tokens_that_fill_up_are_not_counted(path, ranks) -> None:
    """Tests an empty micro-batch, and a row that ranks share."""
    source, packed = documents([37, 5, 9]), load(path)
    batch = collate((0, 1, 2), source)
    parts = [batch.part(part, 4) for part in range(4)]  # 51 tokens on 4 ranks: 13 each, with 1 that fills up
    assert [part.filling for part in parts] == [0, 0, 0, 1] and collate((), source).filling == 2
    assert [collate((), source).part(part, 4).filling for part in range(4)] == [1, 1, 1, 1]
    routers = Routers(packed, None, packed.causal_lm.config, torch.device("cpu"))
    routers.start(SimpleNamespace(document_lengths=(37, 5, 9)))
    for micro_batch in (collate((), source), MicroBatch(**vars(batch) | {"filling": 9})):
        packed(micro_batch)
        assert routers.loss(micro_batch, False) == 0.0
    assert routers.window.sum(dim=1).tolist() == [2 * 42, 2 * 42]


def test_ewc_counts_experts_it_does_not_hold(path, tmp_path, ranks) -> None:
    settings, messages, packed = EWC(1.0, ("old.jsonl",), documents=1), [], load(path)
    dealer, stop = Dealer(256, length_as_cost), SimpleNamespace(agreed=lambda: False, ranks=ranks)
    penalty = start_penalty(packed, settings, tmp_path / "ewc", documents([3]), dealer, "full", stop, messages.append)
    assert penalty is not None
    parameters = {
        name: parameter for name, parameter in penalty.parameters.items() if name.endswith("experts.down_proj")
    }
    unseen = {name: (penalty.anchor.fisher[name].flatten(1) == 0).all(dim=1) for name in parameters}
    count = int(sum(parameter.sum() for parameter in unseen.values()))
    assert 0 < count < 12 and sum(f"reached {count} of 12 experts" in line for line in messages) == 1
    for parameter in penalty.parameters.values():
        parameter.data.add_(0.1)
        parameter.grad = torch.zeros_like(parameter)
    penalty.add_gradient(0)
    for name, parameter in parameters.items():
        is_free = (parameter.grad.flatten(1) == 0).all(dim=1)
        assert torch.equal(is_free, unseen[name]), name


def test_experts_stored_as_one_tensor_are_read(tmp_path) -> None:
    path = write_tiny_model(tmp_path / "model", family="qwen3_moe", tied=False)
    expected = load(path)
    stored = load_file(path / "model.safetensors")
    names = [name for name in stored if ".experts." in name]
    assert len(names) == 2 * 6 * 3
    parameters = dict(expected.causal_lm.named_parameters())
    tensors = {name: tensor for name, tensor in stored.items() if name not in names}
    tensors |= {name: tensor.detach().clone() for name, tensor in parameters.items() if ".experts." in name}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(a, b) for a, b in zip(load(path).parameters(), expected.parameters(), strict=True))
    del stored[names[3]]
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=names[3].replace(".", r"\.")):
        check_weights(build_on_meta(read_model_config(str(path))), str(path))


@pytest.mark.parametrize(
    "dimension, start, stop", [(0, 1, 3), (1, 2, 7), (1, 4, 8)], ids=["experts", "rows-of-both", "rows-of-one"]
)
def test_rank_reads_its_part_of_split_expert_matrices(tmp_path, monkeypatch, dimension, start, stop) -> None:
    whole, file = torch.randn(3, 8, 5), tmp_path / "model.safetensors"
    tensors = {
        f"{PREFIX}.{number}.{side}.weight": half.clone()
        for number in range(3)
        for side, half in zip(("gate_proj", "up_proj"), whole[number].chunk(2), strict=True)
    }
    save_file(tensors, file)
    expected = whole.narrow(dimension, start, stop - start)
    config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=1, head_dim=8, num_experts=3)
    name, stored = f"{PREFIX}.gate_up_proj", stored_tensors(str(tmp_path))
    sources, _ = find_sources(build_on_meta(config).causal_lm, [name], stored)
    part, reads = torch.empty_like(expected), []
    read = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda *arguments: reads.append(part := read(*arguments)) or part)
    sources[name].read_into(part, dimension, start)
    assert torch.equal(part, expected) and sum(tensor.numel() for tensor in reads) == part.numel()


def test_experts_are_cut_only_if_ranks_exceed_them() -> None:
    cut = {ranks: sharded_dimension((32, 2880, 5760), ranks) for ranks in (1, 24, 32, 48, 64, 128)}
    assert cut == {1: 0, 24: 0, 32: 0, 48: 1, 64: 1, 128: 0}  # 128 do not divide 2880 rows
    assert local_shape((32, 2880, 5760), 64) == (32, 45, 5760) and local_shape((32, 5760), 64) == (1, 5760)
    assert sharded_dimension((3, 8), 4) == 0  # a matrix


def config_of(path, **settings) -> Config:  # noqa: ANN003
    model = Model(str(path), compute_dtype="fp32", **settings.pop("model", {}))
    return Config(model, Data(("-",)), Batch(1), Optimizer(1e-3, 1), run=Run("x"), **settings)


def test_settings_that_do_not_fit_experts_are_refused(tmp_path, path) -> None:
    dense = write_tiny_model(tmp_path / "dense")
    with pytest.raises(UserError, match="model.router_aux: .* has no experts"):
        build_to_train(config_of(dense, model={"router_aux": 0.1}), read_model_config(str(dense)))
    with pytest.raises(UserError, match="model.compile=True: .*experts"):
        compile_layers(decoder_layers(load(path)))


def test_experts_are_updated_and_no_bias_decays(path) -> None:
    config = read_model_config(str(path))
    packed = build_on_meta(config)
    load_weights(packed, str(path), torch.device("cpu"))
    parameters = dict(packed.causal_lm.named_parameters())
    optimizer = adamw(parameters, Optimizer(1e-2, 1, weight_decay=0.1), 0)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in parameters.items() if id(parameter) in decayed}
    assert any(name.endswith("experts.down_proj") for name in names)
    assert not any("bias" in name or "norm" in name or "sinks" in name for name in names)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    loss_of(packed, collate((0, 1, 2, 3, 4), documents(LENGTHS))).backward()
    optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in parameters.items())
