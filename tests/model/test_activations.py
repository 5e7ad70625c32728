"""The bytes that a token leaves for backward: counted on fake tensors, and equal to those of a real forward."""

import pytest
import torch

from model.activations import TOKENS, saved_by_forward, saved_bytes
from model.architectures import read_model_config
from model.language_model import build_on_meta, load_weights
from tests.tiny import write_tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_count_is_that_of_a_real_forward_of_all_layers(tmp_path, family, dtype) -> None:
    path = write_tiny_model(tmp_path / "model", family)
    config = read_model_config(str(path))
    model = build_on_meta(config).to(dtype)
    load_weights(model, str(path), torch.device("cpu"))
    saved = saved_bytes(config, dtype)
    expected = config.num_hidden_layers * saved.layer + saved.rest
    real = saved_by_forward(model, TOKENS) / TOKENS
    assert real == pytest.approx(expected, rel=0.03)
    assert saved.layer > 4 * saved.layer_input > 0


def test_parameters_are_not_counted(tmp_path) -> None:
    """Attention in fp32 keeps as much for each token of a longer document, so twice the tokens keep twice the bytes."""
    path = write_tiny_model(tmp_path / "model")
    model = build_on_meta(read_model_config(str(path)))
    load_weights(model, str(path), torch.device("cpu"))
    assert saved_by_forward(model, 200) == pytest.approx(2 * saved_by_forward(model, 100), rel=1e-3)
