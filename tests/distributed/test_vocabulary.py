"""train.py on a model with an extended vocabulary: saved on 2 ranks, resumed on 1, exported.

With LoRA the rows of new tokens are trained beside the adapters, in embedding and head.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.architectures import read_model_config
from model.new_tokens import NewToken
from model.vocabulary import read_base_tokenizer, write_extension
from tests.distributed.launch import largest_difference, launch, run_of, weights, workplace
from tests.tiny import write_tiny_model

NEW = [" new words", " the river", " ratio is", " total surface area", " at all"]
STEPS = 4
PADDED = 1000  # rows of embedding and head, so that rank 1 of 2 has only padding
pytestmark = pytest.mark.slow


def extend(source: Path, target: Path, texts: list[str]) -> None:
    target.mkdir()
    config, tokens = read_model_config(str(source)), [NewToken(text, 20, 20) for text in texts]
    write_extension(source, target, config, read_base_tokenizer(source), tokens)
    settings = json.loads((target / "config.json").read_text())
    settings["make_vocab_size_divisible_by"] = PADDED
    (target / "config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run train.py on 2 ranks and on 1 rank, and stop a run after 2 steps on 2 ranks and resume it on 1 rank."""
    folder = tmp_path_factory.mktemp("vocabulary")
    workplace(folder, 4 * STEPS, model={"layers": 1}, optimizer=f"epochs=1, max_steps={STEPS}", run="save_every=2")
    source = folder / "model"
    assert len(AutoTokenizer.from_pretrained(source)) == 384
    extend(source, folder / "extended", NEW)
    extend(write_tiny_model(folder / "model2", tied=False, layers=1), folder / "untied", NEW)
    with (folder / "train.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"The river shall hold{text} always{text}."}) + "\n" for text in NEW)

    def run(name: str, model: str = "extended", *overrides: str, **options) -> dict:
        return run_of(folder, name, f"model.path={folder / model}", *overrides, **options)

    lora = [run("lora2", "untied", "lora.rank=2"), run("tied", "extended", "lora.rank=2")]
    launch(folder, "two", 2, [run("r2"), run("stopped", plant="signal_at_micro_batch:5"), *lora])
    assert not (folder / "runs" / "stopped" / "export").exists()
    alone = run("lora1", "untied", "lora.rank=2")
    launch(folder, "one", 1, [run("r1"), run("stopped"), alone])
    return folder


def test_resume_on_other_ranks_gives_equal_weights(runs) -> None:
    whole, alone, resumed = (weights(runs / "runs" / name) for name in ("r2", "r1", "stopped"))
    assert largest_difference(whole, resumed) < 1e-5
    assert largest_difference(whole, alone) < 1e-5


def test_export_has_one_row_per_token(runs) -> None:
    export = runs / "runs" / "stopped" / "export"
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)
    assert len(tokenizer) == 384 + len(NEW) == model.config.vocab_size == model.get_output_embeddings().weight.shape[0]
    assert model.config.make_vocab_size_divisible_by == PADDED  # training it again pads it again
    before = AutoModelForCausalLM.from_pretrained(runs / "extended")
    moved = (model.get_input_embeddings().weight - before.get_input_embeddings().weight).abs().amax(1)
    assert moved[384:].min() > 1e-4  # each new token was trained
    ids = tokenizer("the river new words", return_tensors="pt")["input_ids"]
    assert 384 <= ids.max() < 384 + len(NEW)
    answer = model.generate(ids, max_new_tokens=20, do_sample=True, temperature=10.0, pad_token_id=2)
    assert answer.max() < len(tokenizer)


def test_padding_rows_stay_zero(runs) -> None:
    """The checkpoint contains the padding rows. After four steps of AdamW they are still zero."""
    import torch.distributed.checkpoint as dcp

    checkpoint = runs / "runs" / "r2" / "checkpoints" / f"step-{STEPS:06d}"
    tensors = {"model.model.embed_tokens.weight": torch.ones(PADDED, 64)}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    rows = tensors["model.model.embed_tokens.weight"]
    assert rows[: 384 + len(NEW)].abs().amax(1).min() > 0 and not rows[384 + len(NEW) :].any()


@pytest.mark.parametrize("name, base", [("lora2", "untied"), ("tied", "extended")])
def test_lora_trains_rows_of_new_tokens(runs, name, base) -> None:
    assert largest_difference(weights(runs / "runs" / "lora1"), weights(runs / "runs" / "lora2")) < 1e-5
    before, after = load_file(runs / base / "model.safetensors"), weights(runs / "runs" / name)
    vocabulary = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (base == "untied")
    for tensor in vocabulary:
        moved = (after[tensor] - before[tensor]).abs().amax(1)
        assert not moved[:384].any() and moved[384:].min() > 0 and moved[384:].max() > 1e-4
    frozen = {tensor for tensor in before if "norm" in tensor}
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in frozen)
    ids = torch.arange(300, 384 + len(NEW))[None]
    exported = AutoModelForCausalLM.from_pretrained(runs / "runs" / name / "export")
    adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(runs / base), runs / "runs" / name / "adapter"
    )
    assert sum(p.numel() for n, p in adapter.named_parameters() if "trainable_tokens" in n) == 64 * len(NEW) * len(
        vocabulary
    )
    torch.testing.assert_close(adapter(ids).logits, exported(ids).logits, atol=1e-5, rtol=1e-5)
