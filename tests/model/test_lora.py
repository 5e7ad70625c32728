"""LoRA's adapters: their matrices, dtypes, initial values and FLOPs, and the settings that are refused.

Parity over ranks, resume and export are in tests/distributed/test_train.py.
"""

import dataclasses

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from common.errors import UserError
from configs.config import Batch, Config, Data, LoRA, Model, Optimizer, Run
from configs.load import override
from data.batches import collate
from eval.generate import load_for_generation
from model.architectures import read_model_config
from model.build import build_to_train
from model.flops import count_work
from model.language_model import (
    NEW_ROWS,
    PackedLanguageModel,
    build_on_meta,
    load_weights,
    merged,
    num_parameters,
    num_trained,
    parameter_names,
    trained_parameters,
    whole_copy,
)
from model.lora import Adapter, init_adapters, merge, write_adapter
from model.loss import visit_logits
from model.new_tokens import NewToken
from model.vocabulary import read_base_tokenizer, write_extension
from model.weights import Weights, weights_of_directory
from tests.in_memory import InMemory
from tests.losses import loss_of
from tests.model.test_equivalence import documents, load
from tests.tiny import write_tiny_model

HIDDEN, LAYERS, RANK = 64, 2, 4
ON = LoRA(rank=RANK)
# Query, key, value and output, then gate, up and down: 4 heads share 2 key-value heads.
MATRICES = ((64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("lora") / "model", tied=False))


def config_of(path: str, lora: LoRA = ON, compute_dtype: str = "bf16", **sections: object) -> Config:
    return Config(
        Model(path, compute_dtype=compute_dtype),
        Data(("a.jsonl",)),
        Batch(global_examples=4),
        Optimizer(1e-3),
        Run("r"),
        lora=lora,
        **sections,  # pyright: ignore[reportArgumentType]
    )


def loaded(path: str, lora: LoRA = ON, seed: int = 0) -> PackedLanguageModel:
    model = build_to_train(config_of(path, lora, "fp32"), read_model_config(path))
    load_weights(model, path, torch.device("cpu"))
    init_adapters(trained_parameters(model), seed)
    return model


def test_only_adapters_are_trained(path) -> None:
    shape = read_model_config(path)
    plain, model = build_on_meta(shape), build_to_train(config_of(path), shape)
    trained = trained_parameters(model)
    assert num_trained(model) == LAYERS * sum(RANK * (rows + columns) for rows, columns in MATRICES)
    assert num_parameters(model) == num_parameters(plain) + num_trained(model)
    assert len(trained) == LAYERS * 7 * 2 and {p.dtype for p in trained.values()} == {torch.float32}
    base = parameter_names(model)
    assert {n: p.shape for n, p in base.items()} == {n: p.shape for n, p in parameter_names(plain).items()}
    assert {p.dtype for p in base.values()} == {torch.bfloat16} and not any(p.requires_grad for p in base.values())
    assert trained_parameters(plain).keys() == parameter_names(plain).keys()  # without LoRA every parameter is trained
    assert all(p.dtype == torch.float32 for p in build_to_train(config_of(path, LoRA()), shape).parameters())


def test_adapters_begin_as_the_base_model(path) -> None:
    model, plain = loaded(path), load(path)
    batch = collate((0, 1), documents([30, 50]))
    assert loss_of(model, batch).item() == loss_of(plain, batch).item()
    assert {layer.scaling["default"] for layer in model.modules() if hasattr(layer, "lora_A")} == {2.0}
    half = loaded(path, LoRA(rank=RANK, alpha=2.0, targets="q_proj, v_proj"))
    layers = {name: layer for name, layer in half.named_modules() if hasattr(layer, "lora_A")}
    assert len(layers) == 2 * LAYERS and all(name.endswith(("q_proj", "v_proj")) for name in layers)
    assert {layer.scaling["default"] for layer in layers.values()} == {0.5}


def test_matrix_a_is_uniform_and_determined_by_seed(path) -> None:
    first, again, other_seed = (trained_parameters(loaded(path, seed=seed)) for seed in (0, 0, 1))
    a = {name: p.detach() for name, p in first.items() if ".lora_A." in name}
    assert all(torch.equal(p, again[name]) and not torch.equal(p, other_seed[name]) for name, p in a.items())
    assert all(not p.any() for name, p in first.items() if ".lora_B." in name)
    values = torch.cat([(p * p.shape[1] ** 0.5).flatten() for p in a.values()])  # uniform in +-1
    assert values.abs().max() <= 1 and values.abs().max() > 0.99
    assert abs(values.mean()) < 0.05 and values.square().mean() == pytest.approx(1 / 3, rel=0.05)
    assert values.unique().numel() > 0.99 * values.numel()  # no two matrices alike


def test_flops_count_frozen_matrices(path) -> None:
    model, source = loaded(path), documents([30, 50])
    work = count_work(model, read_model_config(path))
    whole = LAYERS * sum(rows * columns for rows, columns in MATRICES)
    assert work.per_token == 4 * whole + 6 * num_trained(model)  # 6 of each without LoRA
    assert work.per_target == 4 * 384 * HIDDEN
    assert work.forward * work.per_token == pytest.approx(2 * (whole + num_trained(model)))
    with FlopCounterMode(display=False) as counter:
        loss_of(model, collate((0, 1), source)).backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    # The first layer has no trained layer before it, so its query, key and value need no gradient of their input.
    unneeded = 2 * sum(rows * columns + RANK * columns for rows, columns in MATRICES[:3])
    expected = (work.per_token - unneeded) * 80 + work.per_target * source.targets.sum()
    assert counted["aten.mm"] == expected


def test_adapter_gradients_follow_from_full_gradients(path) -> None:
    """d loss / d B = scale * (d loss / d W) A^T at B = 0, matrix by matrix."""
    model, plain, batch = loaded(path), load(path), collate((0, 1), documents([30, 50]))
    loss_of(model, batch).backward()
    loss_of(plain, batch).backward()
    whole = {name: p.grad for name, p in parameter_names(plain).items()}
    for name, layer in model.causal_lm.named_modules():
        if hasattr(layer, "lora_A"):
            expected = 2.0 * whole[f"{name}.weight"] @ layer.lora_A["default"].weight.T
            torch.testing.assert_close(layer.lora_B["default"].weight.grad, expected, rtol=1e-4, atol=1e-5)
    assert model.head.weight.grad is None and model.embedding.weight.grad is None


def test_an_unknown_matrix_is_refused(path) -> None:
    shape = read_model_config(path)
    words = "lora.targets: the model has no matrix 'lm_head' in its layers; it has down_proj, gate_proj, k_proj"
    with pytest.raises(UserError, match=words):
        build_to_train(config_of(path, LoRA(rank=RANK, targets="q_proj,lm_head")), shape)


@pytest.mark.parametrize(
    "words, changes",
    [
        ("lora.rank must be 0 or more", ["lora.rank=-1"]),
        ("lora.alpha must be above 0", ["lora.alpha=0"]),
        ("lora.targets=q_proj needs lora.rank above 0", ["lora.rank=0", "lora.targets=q_proj"]),
        ("lora.dropout must be at least 0 and below 1", ["lora.dropout=1"]),
        (
            "lora.dropout=0.1 needs model.activation_checkpointing=none",
            ["lora.dropout=0.1", "model.activation_checkpointing=full"],
        ),
        ("ewc.strength=1.0 needs lora.rank=0", ["ewc.strength=1", "ewc.data=b"]),
    ],
)
def test_wrong_lora_settings_are_refused(words, changes) -> None:
    assert override(config_of("m"), ["lora.dropout=0.1"]).lora.dropout == 0.1
    with pytest.raises(UserError, match=words):
        override(config_of("m"), changes)


def test_copy_for_generation_has_merged_adapters(path) -> None:
    model, shape = loaded(path), read_model_config(path)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    copied = whole_copy(shape, parameter_names(model), torch.float32, torch.device("cpu"), merged(model))
    matrix = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(f"causal_lm.{matrix}")
    change = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert change.abs().max() > 0.01
    torch.testing.assert_close(copied.get_submodule(matrix).weight, layer.base_layer.weight + change)
    torch.testing.assert_close(copied.lm_head.weight, model.head.weight)


@pytest.mark.parametrize("family, tied", [("llama", False), ("gemma2", True)])  # Gemma scales its embedding
def test_peft_agrees_on_rows_of_new_tokens(tmp_path, family, tied) -> None:
    source = write_tiny_model(tmp_path / "source", family=family, tied=tied)
    extended, folder = tmp_path / "extended", tmp_path / "adapter"
    extended.mkdir(), folder.mkdir()
    shape, tokens = read_model_config(str(source)), [NewToken(text, 20, 20) for text in (" new words", " at all")]
    write_extension(source, extended, shape, read_base_tokenizer(source), tokens)
    model, generator = loaded(str(extended)), torch.Generator().manual_seed(0)
    trained = {name: p.detach() for name, p in trained_parameters(model).items() if ".lora_A." not in name}
    assert sum(name.endswith(NEW_ROWS) for name in trained) == (1 if tied else 2)
    for parameter in trained.values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    weights = {name.replace(".default.", "."): p.detach() for name, p in trained_parameters(model).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    adapter = Adapter(Weights(shapes, weights.__getitem__), ON)
    write_adapter(folder, adapter, extended, str(extended), lambda _, tensor: tensor)
    ids, chunks = torch.tensor([5, 384, 9, 385, 385, 7]), []
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(extended), folder)(ids[None]).logits[0]
    in_memory = InMemory([ids.numpy()], [np.arange(6) > 0])
    batch = dataclasses.replace(collate((0,), in_memory), target_positions=torch.arange(6))
    with torch.no_grad():
        visit_logits(model.head, model(batch), lambda logits, _: chunks.append(logits))
    torch.testing.assert_close(theirs, torch.cat(chunks), atol=1e-4, rtol=1e-4)
    again = load_for_generation(str(folder), torch.float32, torch.device("cpu"))  # merged by peft
    torch.testing.assert_close(again(input_ids=ids[None]).logits[0], theirs, atol=1e-4, rtol=1e-4)
    base = weights_of_directory(extended, build_on_meta(read_model_config(str(extended))))
    whole = merge(base, adapter)
    for name, value in parameter_names(model).items():
        torch.testing.assert_close(whole.read(name), merged(model)(name, value.detach())[: whole.shapes[name][0]])
