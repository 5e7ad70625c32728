"""scripts/plot_shares.py: the shares of a config's plan, and those of the same sources with whole documents."""

import json

import pytest

from tests.processes import run_python
from tests.tiny import SENTENCES, write_chat_file, write_tiny_model


@pytest.mark.slow
def test_shares_of_cut_and_of_whole_documents(tmp_path) -> None:
    write_tiny_model(tmp_path / "model")
    write_chat_file(tmp_path / "chats.jsonl", 60)
    text = " ".join(SENTENCES) * 2
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text[i:]}) + "\n" for i in range(8)))
    (tmp_path / "config.py").write_text(f"""
from configs.config import *
here = {str(tmp_path)!r}
config = Config(
    model=Model(here + "/model"),
    data=Data((here + "/chats.jsonl",), mix=(Source("law", (here + "/texts.jsonl",), 0.2),), sequence_length=512),
    batch=Batch(global_examples=8),
    optimizer=Optimizer(1e-3, epochs=2),
    run=Run("base"),
)
""")
    config, image = tmp_path / "config.py", tmp_path / "shares.png"
    done = run_python("scripts/plot_shares.py", config, "data.cache=None", "--out", image)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("as planned: law has ")
    assert lines[0].endswith("0% of 16 steps have nothing of it, 100% are within a factor of two of 20%")
    nothing = int(lines[1].split("% of 16 steps")[0].rsplit(" ", 1)[1])
    assert lines[1].startswith("with whole documents: law has 0.0% to ") and nothing > 30
    assert image.stat().st_size > 5_000
    refused = run_python("scripts/plot_shares.py", config, "data.mix=none", "--out", image)
    assert refused.returncode == 2 and "mixes no source in; name one in data.mix" in refused.stderr
