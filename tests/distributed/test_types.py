"""Types that the start proves train through train.py: equal on 1 and 2 ranks, to the bit after a stop, and exported for transformers."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from data.tokens import load_tokenizer
from scripts.verify.files import compare
from tests.distributed.launch import (
    ENVIRONMENT,
    assert_same_update,
    launch,
    relative_difference,
    rows,
    run_of,
    workplace,
)
from tests.model.test_text_part import write_tiny_composite
from tests.processes import run_ranks
from tests.tiny import encode_one, write_tiny_model

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parents[1] / "model" / "types_worker.py"
# TYPES=all also trains the types of SHOWN that the suite has no time for, and every type of transformers on 2 ranks.
EVERY = os.environ.get("TYPES") == "all"
SHOWN = ("qwen3_5_text", "llama4_text", "deepseek_v3")
SHOWN += ("gemma4_text", "lfm2", "granitemoehybrid", "glm4_moe", "mixtral", "gpt2", "gpt_neox") if EVERY else ()
# A key bias has no gradient but rounding, which AdamW makes as large as any other. The tiny Gemma 4 has gradients of thousands.
AMPLIFYING = ("gpt2", "gpt_neox", "gemma4_text")
FEW = [t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if hashlib.sha256(t.encode()).digest()[0] % 24 == 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("types")
    workplace(
        folder, 12, 3, data="packing=True", optimizer="max_steps=3", run="keep_last=9, save_every=1, eval_every=3"
    )
    for family in SHOWN:
        write_tiny_model(folder / family, family, tied=False)
    base = write_tiny_composite(folder / "composite", "qwen3_5")
    stored = load_file(base / "model.safetensors") | {"mtp.fc.weight": torch.ones(3)}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    for world in (1, 2):
        runs = [run_of(folder, f"part-{world}", f"model.path={base}", "model.part=text")]
        for family in SHOWN:
            settings = (f"model.path={folder / family}", f"batch.micro_batch={2 // world}")
            runs.append(run_of(folder, f"{family}-{world}", *settings))
            if world == 2:
                stopped = f"{family}-stopped"
                runs += [run_of(folder, stopped, *settings, "run.stop_at=2"), run_of(folder, stopped, *settings)]
        launch(folder, f"world{world}", world, runs)
    return folder


@pytest.mark.parametrize("family", SHOWN)
def test_proved_type_trains_stops_and_exports(folder, family) -> None:
    runs = folder / "runs"
    if family in AMPLIFYING:
        for key, limit in (("train/loss", 1e-5), ("train/grad_norm", 1e-3)):
            assert relative_difference(rows(runs / f"{family}-1"), rows(runs / f"{family}-2"), key) < limit
    else:
        assert_same_update(runs / f"{family}-2", runs / f"{family}-1")
    assert_same_update(runs / f"{family}-stopped", runs / f"{family}-2", limit=0)
    start = json.loads((runs / f"{family}-2" / "record.jsonl").read_text().splitlines()[0])
    assert start["proof"]["packed"] is (family != "llama4_text")
    export = runs / f"{family}-2" / "export"
    model, tokenizer, losses = (
        AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32),
        load_tokenizer(str(export)),
        [],
    )
    for line in (folder / "validation.jsonl").read_text().splitlines():
        ids, targets = encode_one(tokenizer, json.loads(line))
        losses.append(model(torch.tensor([ids])).logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]][targets[1:]])
    *_, last = rows(runs / f"{family}-2", "validation/loss").values()
    assert last["validation/loss"] == pytest.approx(-torch.cat(losses).mean().item(), rel=1e-5)


def test_text_part_is_exported_in_whole_model(folder) -> None:
    runs = folder / "runs"
    assert_same_update(runs / "part-2", runs / "part-1")
    before, export = load_file(folder / "composite" / "model.safetensors"), runs / "part-2" / "export"
    after = load_file(export / "model.safetensors")
    assert after.keys() == before.keys()
    is_equal = {name: torch.equal(tensor, before[name]) for name, tensor in after.items()}
    assert {name for name, same in is_equal.items() if same} == {n for n in before if "visual" in n or "mtp" in n}
    whole = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32)
    assert type(whole).__name__ == "Qwen3_5ForConditionalGeneration"
    assert (export / "preprocessor_config.json").is_file()
    lines = list[str]()
    compare(runs / "part-2", None, lines.append)
    assert "nothing differs from the record" in lines


@pytest.mark.parametrize("world_size", [2] if not EVERY else [1, 2])
def test_types_train_as_transformers_or_are_refused(tmp_path, world_size) -> None:
    file = tmp_path / "types.json"
    process = run_ranks(world_size, WORKER, file, *([] if EVERY else FEW), **ENVIRONMENT)
    assert process.returncode == 0, process.stderr[-3000:]
    outcomes = json.loads(file.read_text())
    assert set(outcomes) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if EVERY else FEW)
    kinds = ("packed", "alone: ", "refused: ", "text part: ", "no config: ")
    assert {kind: words for kind, words in outcomes.items() if not words.startswith(kinds)} == {}
    assert sum(words == "packed" for words in outcomes.values()) >= len(outcomes) / 2
