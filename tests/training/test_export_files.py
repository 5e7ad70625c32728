"""What an export has beside its weights: generation stops where training taught the model to stop, and chats render alike."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from common.errors import UserError
from configs.config import Batch, Config, Data, LoRA, Model, Optimizer, Run
from data.chat_template import ChatSettings, read_chat_settings
from data.encoding import ExampleEncoder
from data.tokens import load_tokenizer, tokenizer_fingerprint
from eval.generate import stop_tokens
from model.lora import Adapter, write_adapter
from model.new_tokens import NewToken
from model.vocabulary import read_base_tokenizer, write_extension
from model.weights import Weights
from tests.tiny import write_tiny_model
from training import ending
from training.chat_settings import chat_settings
from training.ending import name_rope_as_before, sums_of

EOS, END_OF_TURN, OTHER = 0, 2, 1  # <|endoftext|>, <|im_end|> of the chat template, and one that only the base knows
PROMPT, ANSWER = [5, 6, 7], [20, 21, 22]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model whose EOS is not the token that ends an answer, as with Llama 3, Gemma and Phi-3."""
    path = write_tiny_model(tmp_path_factory.mktemp("base"))
    tokenizer = load_tokenizer(str(path))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(path)
    generation = {"eos_token_id": OTHER, "do_sample": False, "max_new_tokens": 7, "_from_model_config": True}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def config_of(base, **data):
    return Config(Model(str(base)), Data(("a.jsonl",), **data), Batch(1), Optimizer(1e-4), Run("r"))


def write_files(folder, config, model_config, tokenizer):
    chats = chat_settings(config.data)
    stop_ids = ExampleEncoder(tokenizer, chats).stop_ids
    ending.write_files(folder, config, model_config, tokenizer, chats, stop_ids, model_config.dtype)


def export(base, folder, config=None, template=None):
    config = config or config_of(base)
    folder.mkdir()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    write_files(folder, config, AutoConfig.from_pretrained(base), load_tokenizer(str(base), template))
    return folder


class Script(LogitsProcessor):
    """Makes the model say given tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - len(PROMPT)]] = 0.0
        return forced


@pytest.mark.parametrize("stop", [EOS, END_OF_TURN, OTHER])
def test_transformers_stops_at_the_trained_end(base, tmp_path, stop):
    folder = export(base, tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(folder)
    script = Script([*ANSWER, stop, *[30] * 9])
    ids = model.generate(torch.tensor([PROMPT]), logits_processor=[script])
    assert ids[0].tolist() == [*PROMPT, *ANSWER, stop]
    unstopped = Script([*ANSWER, 4, *[30] * 9])
    ids = model.generate(torch.tensor([PROMPT]), logits_processor=[unstopped])
    assert len(ids[0]) == len(PROMPT) + 7  # max_new_tokens of the base's file


def test_generation_config_keeps_the_base_settings(base, tmp_path):
    folder = export(base, tmp_path / "export")
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == {"eos_token_id": [EOS, OTHER, END_OF_TURN], "do_sample": False, "max_new_tokens": 7}
    taught = ExampleEncoder(load_tokenizer(str(base))).stop_ids
    assert stop_tokens(AutoModelForCausalLM.from_pretrained(folder), taught) == {EOS, OTHER, END_OF_TURN}  # our own
    again = json.loads((export(folder, tmp_path / "again") / "generation_config.json").read_text())
    assert again["eos_token_id"] == [EOS, OTHER, END_OF_TURN]  # an export is the base of the next run


def test_missing_generation_config_is_created(base, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    tokenizer, config = load_tokenizer(str(base)), AutoConfig.from_pretrained(base)
    tokenizer.name_or_path = str(bare)
    config.auto_map = {"AutoConfig": "configuration_of_the_base.Config"}  # Phi-3: a file that the export does not have
    config.save_pretrained(tmp_path)
    write_files(bare, config_of(tmp_path), config, tokenizer)
    assert AutoConfig.from_pretrained(bare, trust_remote_code=True).model_type == config.model_type
    assert json.loads((bare / "generation_config.json").read_text()) == {"eos_token_id": [EOS, END_OF_TURN]}
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="generation_config.json is damaged .*; remove it or copy it again"):
        write_files(bare, config_of(tmp_path), config, tokenizer)


def test_transformers_4_would_read_the_same_tokenizer(base, tmp_path):
    """It knows no TokenizersBackend, and no list of extra_special_tokens."""
    model, tokenizer = AutoConfig.from_pretrained(base), load_tokenizer(str(base))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<sep>"]})
    write_files(tmp_path, config_of(base), model, tokenizer)
    assert "rope_theta" in json.loads((tmp_path / "config.json").read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<sep>"] and "extra_special_tokens" not in settings
    read = load_tokenizer(str(tmp_path))
    assert type(read) is type(tokenizer) and tokenizer_fingerprint(read) == tokenizer_fingerprint(tokenizer)
    assert read.all_special_tokens == tokenizer.all_special_tokens


def test_chat_json_is_written_only_if_needed(base, tmp_path):
    plain = export(base, tmp_path / "plain")
    assert not (plain / "chat.json").exists() and read_chat_settings(plain) == ChatSettings()
    options = {"enable_thinking": False}
    config = config_of(base, chat_date="2025-03-01", chat_template_options=options, control_tokens="allow")
    folder = export(base, tmp_path / "export", config)
    content = json.loads((folder / "chat.json").read_text())
    assert content == {"date": "2025-03-01", "template_options": options, "control_tokens": "allow"}
    assert read_chat_settings(folder) == ChatSettings(options, "2025-03-01", control_tokens="allow")
    for damage in ('{"date": 2025}', '{"control_tokens": "never"}'):
        (folder / "chat.json").write_text(damage)
        with pytest.raises(UserError, match="chat.json is damaged"):
            read_chat_settings(folder)


def test_exported_tokenizer_has_the_run_template(base, tmp_path):
    template = tmp_path / "template.jinja"
    text = "{% for m in messages %}[{{ m.role }}|{{ enable_thinking }}|{{ strftime_now('%Y') }}]{{ m.content }}{% endfor %}"
    template.write_text(text)
    data = {"chat_template": str(template), "chat_date": "2025-03-01"}
    config = config_of(base, **data, chat_template_options={"enable_thinking": False})
    folder = export(base, tmp_path / "export", config, str(template))
    assert AutoTokenizer.from_pretrained(folder).chat_template == text
    assert read_chat_settings(folder).date == "2025-03-01"
    chat = [{"role": "user", "content": "Hi"}]
    encoder = ExampleEncoder(load_tokenizer(str(folder)), read_chat_settings(folder))
    assert encoder.template.render(chat) == "[user|False|2025]Hi"
    other = dataclasses.replace(read_chat_settings(folder), date="2019-03-01")
    assert ExampleEncoder(load_tokenizer(str(folder)), other).template.render(chat) == "[user|False|2019]Hi"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e6}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("kind", "rope", "old"),
    [
        ("llama", PLAIN | {"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ("glm", PLAIN | {"partial_rotary_factor": 0.5}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("qwen3", YARN, {"rope_theta": 1e6, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}}),
        (
            "gemma3_text",
            {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": PLAIN},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        ("olmo3", {"full_attention": PLAIN, "sliding_attention": PLAIN}, {"rope_theta": 1e4}),
    ],
)
def test_transformers_4_and_5_read_equal_rope(kind, rope, old, tmp_path):
    """transformers 4.57.6, which no test installs, read these files right."""
    path = tmp_path / "config.json"
    AutoConfig.for_model(kind, rope_parameters=rope).save_pretrained(tmp_path)
    before, names = AutoConfig.from_pretrained(tmp_path).to_dict(), json.loads(path.read_text()).keys()
    name_rope_as_before(path)
    config = json.loads(path.read_text())
    assert {key: config[key] for key in config.keys() - names} == old
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == before


def test_licence_texts_are_exported(base, tmp_path):
    """Into an export, an adapter and an extension; a folder, a damaged link and a file too large for a text stay behind."""
    source = shutil.copytree(base, tmp_path / "base")
    for name in ("LICENSE", "LICENCE.txt", "NOTICE", "USE_POLICY.md"):
        (source / name).write_text(name)
    (source / "LICENSES").mkdir()
    (source / "NOTICE.link").symlink_to("nowhere")
    (source / "LICENSE.bin").write_bytes(bytes(2**20 + 1))
    folder = export(source, tmp_path / "export")
    extended, adapter = tmp_path / "extended", tmp_path / "adapter"
    for target in (extended, adapter):
        target.mkdir()
    config = AutoConfig.from_pretrained(source)
    write_extension(source, extended, config, read_base_tokenizer(source), [NewToken(" own funds", 9, 9)])
    write_adapter(adapter, Adapter(Weights({}, {}.__getitem__), LoRA(4)), source, "base", lambda name, tensor: tensor)
    for target in (folder, extended, adapter):
        found = {path.name: path.read_text() for path in target.iterdir() if re.match("LI|NO|US", path.name)}
        assert found == {name: name for name in ("LICENSE", "LICENCE.txt", "NOTICE", "USE_POLICY.md")}
    assert {"LICENSE", "NOTICE"} <= sums_of(folder).keys()


def test_tool_template_is_kept_with_its_digest(base, tmp_path):
    """transformers keeps all but the default template in a folder (Command-R)."""
    tokenizer, template = load_tokenizer(str(base)), {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.chat_template = template
    folder = tmp_path / "export"
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(folder)
    write_files(folder, config_of(base), model.config, tokenizer)
    assert "additional_chat_templates/tool_use.jinja" in sums_of(folder)
    (extended := tmp_path / "extended").mkdir()
    write_extension(folder, extended, model.config, read_base_tokenizer(folder), [NewToken(" own funds", 9, 9)])
    assert [load_tokenizer(str(path)).chat_template for path in (folder, extended)] == [template, template]
