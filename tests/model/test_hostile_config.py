"""A config.json that would build a model for minutes is refused at once, by the sentence that names its key."""

import json

import pytest

from common.errors import UserError
from model.architectures import read_model_config
from model.weight_files import stored_tensors
from tests.tiny import write_tiny_model


@pytest.mark.parametrize("layers", [10**7, 10**30])
def test_too_many_layers_are_one_sentence(tmp_path, layers) -> None:
    path = write_tiny_model(tmp_path / "model") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(UserError, match=f"model/config.json: num_hidden_layers={layers}, and no model has over 1000"):
        read_model_config(str(path.parent))


def test_nested_files_are_one_sentence(tmp_path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (folder / "config.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match="has no valid model configuration: maximum recursion depth"):
        read_model_config(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[" * 10**5)
    with pytest.raises(UserError, match="is not a JSON object with a weight_map"):
        stored_tensors(folder)
