"""The shapes that plan.py knows without a network give the published numbers of parameters, in architectures that are trained."""

import pytest

from common.errors import UserError
from model.architectures import check_supported
from model.language_model import build_on_meta
from scripts.plan.models import MODELS, SIZES, known_config, named_config, published_millions, smaller_models


@pytest.mark.parametrize("name", MODELS)
def test_shape_has_the_published_parameters(name) -> None:
    config = named_config(name)
    check_supported(config)
    layers, config.num_hidden_layers = config.num_hidden_layers, 1  # all layers of these models have equal shapes
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    model = build_on_meta(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    in_layer = sum(tensor.numel() for key, tensor in model.named_parameters() if ".layers.0." in key)
    assert round((total + (layers - 1) * in_layer) / 1e6) == published_millions(name)


@pytest.mark.parametrize(
    "name, known",
    [
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("qwen/qwen3-8b-base", "Qwen/Qwen3-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("google/gemma-3-1b-it", "google/gemma-3-1b-pt"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_chat_models_share_the_shape(name, known) -> None:
    assert named_config(name).to_dict() == named_config(known).to_dict()


def test_other_owners_are_unknown() -> None:
    assert known_config("someone/Qwen3-8B") is None and known_config("Qwen/Qwen9-8B") is None
    with pytest.raises(UserError, match="9B is neither a model directory, nor an id on the hub"):
        named_config("9B")


def test_smaller_models_prefer_the_family() -> None:
    config = named_config("Qwen/Qwen3-8B")
    names = [name for name, _, _ in smaller_models(8_190_735_360, config.model_type)]
    assert names[:3] == ["Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-1.7B"]
    assert "Qwen/Qwen3-8B" not in names and "google/gemma-2-2b" in names
    assert all(size in SIZES for size in ("8B", "70B"))
