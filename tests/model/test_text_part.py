"""Text parts of models that also read images: the same loss as the whole model's, and an export that is the whole model again."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from common.errors import UserError
from configs.config import Model
from data.batches import collate
from model.architectures import read_model_config
from model.build import model_config_of
from model.language_model import build_on_meta, check_weights, load_weights, tensors_in_files, untrained_tensors
from model.loss import chunked, negative_log_likelihood
from model.text_part import COMPOSITES, load_causal_lm
from model.weights import weights_of_directory, write_weights
from tests.in_memory import texts
from tests.tiny import any_tiny_config, tiny_tokenizer

LENGTHS = (37, 5, 64, 21)
# Sizes of the part that reads images, in the names of several types
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
VISION |= {"depth": 1, "num_heads": 2, "num_layers": 1, "num_key_value_heads": 2, "global_head_dim": 16}
VISION |= {"image_size": 28, "patch_size": 14, "out_hidden_size": 64, "deepstack_visual_indexes": []}
IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id")
IMAGE_TOKENS += ("audio_token_id", "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_index")


def write_tiny_composite(folder: Path, kind: str) -> Path:
    """Save a random model of this type, with a tokenizer and a file that describes its images."""
    defaults = AutoConfig.for_model(kind)
    of_images = defaults.vision_config or AutoConfig.for_model(f"{kind}_vision")
    names = {*of_images.to_dict(), *type(of_images).attribute_map}
    vision = {name: size for name, size in VISION.items() if name in names}
    settings = {name: 300 for name in IMAGE_TOKENS if name in vars(defaults)} | {"tie_word_embeddings": False}
    settings |= {"audio_config": None} if hasattr(defaults, "audio_config") else {}
    text = any_tiny_config(defaults.get_text_config().model_type).to_dict()
    vision["model_type"] = of_images.model_type
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **settings)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 28}))
    return folder


@pytest.mark.parametrize("kind", COMPOSITES)
def test_text_part_trains_as_in_whole_model(tmp_path, kind) -> None:
    base = write_tiny_composite(tmp_path / "base", kind)
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    source = texts(LENGTHS)
    expected = torch.zeros(())
    for ids in map(torch.from_numpy, source.ids):
        expected = expected + F.cross_entropy(whole(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")
    expected.backward()
    config = read_model_config(str(base))
    model, batch = build_on_meta(config), collate(tuple(range(len(LENGTHS))), source)
    load_weights(model, str(base), torch.device("cpu"))
    loss = chunked(model.head, model(batch), batch, negative_log_likelihood)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradient, theirs = model.embedding.weight.grad, whole.get_input_embeddings().weight.grad
    assert gradient is not None and theirs is not None
    assert (gradient - theirs).norm() < 1e-3 * theirs.norm()

    weights, export = weights_of_directory(base, model), tmp_path / "export"
    export.mkdir()
    doubled = weights.__class__(weights.shapes, lambda name: 2 * weights.read(name))
    copied = untrained_tensors(model, base, with_ignored=False)
    write_weights(export, doubled, torch.float32, form=model.stored_form, copied=copied)
    AutoConfig.from_pretrained(base).save_pretrained(export)
    again = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).state_dict()
    before, place = whole.state_dict(), model.part.name if model.part else str
    trained = {place(name) for name in tensors_in_files(model)}
    assert again.keys() == before.keys() and trained < again.keys()
    for name, tensor in before.items():
        assert torch.equal(again[name], 2 * tensor if name in trained else tensor), name
    ids = torch.from_numpy(source.ids[0])[None]
    with torch.no_grad():
        assert torch.equal(load_causal_lm(base)(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_text_part_is_trained_only_if_named(tmp_path) -> None:
    base = write_tiny_composite(tmp_path, "qwen3_5")
    with pytest.raises(UserError, match="qwen3_5 also reads images; model.part=text trains its text part"):
        model_config_of(Model(path=str(base)))
    assert model_config_of(Model(path=str(base), part="text")).model_type == "qwen3_5_text"


def test_damage_of_other_parts_is_one_sentence(tmp_path) -> None:
    base = write_tiny_composite(tmp_path, "qwen3_5")
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "visual" in name and tensors[name].dim() == 2)
    for damaged, words in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, f"has no tensor {name}"),
        (tensors | {name: torch.ones(3, 3)}, r"has shape \(3, 3\), but config.json needs"),
    ):
        save_file(damaged, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=words):
            check_weights(build_on_meta(read_model_config(str(base))), str(base))
    (base / "preprocessor_config.json").write_text('{"size": ')
    with pytest.raises(UserError, match="preprocessor_config.json cannot be read as JSON"):
        model_config_of(Model(path=str(base), part="text"))
