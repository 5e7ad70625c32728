"""Replay documents: independent of interruptions, dependent on the seed, and without what evaluation uses."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common.durable_files import write_json, write_json_lines
from common.errors import UserError
from data.replay_filters import EvaluationTexts, normalize
from data.tokens import load_tokenizer
from distributed.process_group import start_process_group
from eval.general_text import held_out_texts
from eval.load_over_ranks import load_causal_lm
from eval.questions import read_questions
from eval.sample_replay import ReplaySampler, SamplingOptions, texts_to_exclude, topic_texts
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    write_tiny_model(folder / "model")
    return folder


@pytest.fixture
def sample(folder):
    """Sample documents for an output file; returns the sampler and the documents."""
    threads = torch.get_num_threads()

    def call(out, **options):
        settings = {"documents": 8, "max_tokens": 40, "batch_size": 3, "dtype": "fp32", "temperature": 1.5}
        sampler = ReplaySampler(SamplingOptions(str(folder / "model"), **settings | options), folder / out)
        ranks = start_process_group()
        try:
            return sampler, sampler.sample(ranks)
        finally:
            dist.destroy_process_group()

    yield call
    torch.set_num_threads(threads)


def test_topics_do_not_overlap_evaluation(tmp_path, monkeypatch):
    evaluation = EvaluationTexts([*held_out_texts(), *(q.prompt + q.options[0] for q in read_questions())])
    texts, _ = topic_texts(texts_to_exclude([]))
    assert sum(map(len, texts)) > 200_000
    assert not any(evaluation.overlaps(normalize(part)) for text in texts for part in text.split("\n\n"))
    paragraph = max(texts[0].split("\n\n"), key=len)
    (tmp_path / "more.txt").write_text(paragraph)
    monkeypatch.setattr("eval.sample_replay.training_texts", lambda: texts[:1])
    fewer, num_dropped = topic_texts(texts_to_exclude([tmp_path / "more.txt"]))
    assert num_dropped >= 1 and not any(paragraph in text for text in fewer)


def test_resume_keeps_finished_batches(sample, folder):
    options = {"form": "text", "start": "<|endoftext|>"}
    sampler, whole = sample("texts.jsonl", **options)
    assert len({document["text"] for document in whole}) > 2
    assert sample("other.jsonl", **options, seed=1)[1] != whole

    # Simulate a command that was killed after its second batch. The text of that batch is recognizable.
    parts = folder / "again.jsonl.parts"
    parts.mkdir()
    (parts / "settings.json").write_bytes((sampler.parts / "settings.json").read_bytes())
    settings = json.loads((parts / "settings.json").read_text())
    expected = {"form": "text", "start": [0], "model": str(folder / "model"), "documents": 8, "max_tokens": 40}
    expected |= {"temperature": 1.5, "top_p": 0.95, "seed": 0, "batch_size": 3, "dtype": "fp32"}
    assert settings == expected
    finished = {"text": "This was written\u2028before the kill.", "finished": True}
    write_json_lines(parts / "000000003.jsonl", [finished] * 3)
    with pytest.raises(UserError, match="was made with another seed"):
        sample("again.jsonl", **options, seed=1)
    again = sample("again.jsonl", **options)[1]
    assert again == [*whole[:3], finished, finished, finished, *whole[6:]]


def test_batch_cut_short_is_not_written(sample, folder, monkeypatch):
    """The signal arrives in the third forward of the second batch. A sharded model is loaded with a StopSignal."""
    options = {"form": "text", "start": "<|endoftext|>", "documents": 6}
    whole, parts, forwards = sample("unsignalled.jsonl", **options)[1], folder / "signalled.jsonl.parts", []

    def load_with_stop(path, dtype, sharded, ranks):
        model, _ = load_causal_lm(path, dtype, sharded, ranks)
        stop = SimpleNamespace(ranks=ranks, name=None, stopped=False)

        def count(*_):
            if (parts / "000000000.jsonl").exists():
                forwards.append(1)
                stop.name = "SIGTERM" if len(forwards) > 2 else None

        model.register_forward_hook(count)
        return model, stop

    with monkeypatch.context() as patched:
        patched.setattr("eval.sample_replay.load_causal_lm", load_with_stop)
        with pytest.raises(KeyboardInterrupt):
            sample("signalled.jsonl", **options)
    assert len(forwards) == 3
    assert sorted(path.name for path in parts.iterdir()) == ["000000000.jsonl", "settings.json"]
    assert sample("signalled.jsonl", **options)[1] == whole


@pytest.mark.parametrize(
    ("options", "form", "start"),
    [
        ({}, "chat", "<|im_start|>user\n"),
        ({"form": "text"}, "text", "<|im_end|>"),  # the tokenizer adds no BOS: EOS
        ({"start": "The bank"}, "text", "The bank"),
    ],
)
def test_a_chat_model_writes_chats(folder, options, form, start):
    sampler = ReplaySampler(SamplingOptions(str(folder / "model"), **options), folder / "none.jsonl")
    tokenizer = load_tokenizer(str(folder / "model"))
    assert (sampler.form, tokenizer.decode(sampler.start)) == (form, start)


def test_chat_start_uses_the_runs_settings(folder, tmp_path):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(model)
    write_json(model / "chat.json", {"date": "2019-03-01"})
    sampler = ReplaySampler(SamplingOptions(str(model)), tmp_path / "none.jsonl")
    assert tokenizer.decode(sampler.start) == "2019<|im_start|>user\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"top_p": 0.0}, "--top-p must be above 0 and at most 1"),
        ({"model": None}, "--source model needs a --model"),
        ({"model": "nowhere"}, "--model=nowhere is not a directory"),
        ({"form": "chat", "start": "a"}, "--start goes with --form text"),
        ({"start": ""}, "--start '' has no tokens"),
    ],
)
def test_a_mistake_is_one_sentence(folder, options, message):
    with pytest.raises(UserError, match=message):
        ReplaySampler(SamplingOptions(**{"model": str(folder / "model")} | options), folder / "none.jsonl")
