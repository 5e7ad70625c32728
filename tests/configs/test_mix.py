"""`data.mix` on the command line and in config files."""

import dataclasses

import pytest

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run, Source
from configs.load import override

BASE = Config(Model("m"), Data(("a.jsonl",)), Batch(global_examples=4), Optimizer(1e-5), Run("r"))


def test_a_mix_on_the_command_line() -> None:
    mixed = override(BASE, ["data.mix=general:0.05:a.jsonl,b.txt;law:1e-1:c.jsonl.gz:d.txt"])
    assert mixed.data.mix == (
        Source("general", ("a.jsonl", "b.txt"), 0.05),
        Source("law", ("c.jsonl.gz",), 0.1, ("d.txt",)),
    )
    named = override(
        BASE, ["data.mix=org/name:train=0.1;o/n@main:one:test=0.2;a/b.jsonl.gz,c.txt=0.05;s3://b/d.csv=1e-1"]
    )
    assert named.data.mix == (
        Source("name-train", ("org/name:train",), 0.1),
        Source("n-main-one-test", ("o/n@main:one:test",), 0.2),
        Source("b", ("a/b.jsonl.gz", "c.txt"), 0.05),
        Source("d", ("s3://b/d.csv",), 0.1),
    )
    anchored = override(BASE, ["data.mix=base:0.1:anchor:a.jsonl:v.txt;o/n:test=2e-1:anchor;anchor=0.1"])
    assert anchored.data.mix == (
        Source("base", ("a.jsonl",), 0.1, ("v.txt",), anchor=True),
        Source("n-test", ("o/n:test",), 0.2, anchor=True),
        Source("anchor", ("anchor",), 0.1),
    )
    assert override(anchored, ["forgetting.anchor_weight=2"]).forgetting.anchor_weight == 2.0
    with pytest.raises(UserError, match=r"anchor_weight=2.0 needs a source of data.mix with anchor"):
        override(mixed, ["forgetting.anchor_weight=2"])
    assert override(mixed, ["data.mix=none"]).data.mix == ()
    assert override(mixed, ["data.mix="]).data.mix == ()


@pytest.mark.parametrize(
    "text, words",
    [
        ("general", "'general' is not a source; write NAME:SHARE:FILE,FILE"),
        ("general:0.1:org/name:train", "is not a source; .* e.g. ORG/NAME:SPLIT=0.05"),
        ("org/name:train=much", "is not a source"),
        ("general:5:a.txt", "data.mix.share must be above 0 and below 1, not 5.0"),
        ("a:0.5:a.txt;b:0.5:b.txt", "shares that add up to less than 1"),
        ("a:0.1:a.txt;a:0.1:b.txt", "the sources need different names"),
        ("main:0.1:a.txt", "data.mix.name must be made of letters, .*, but not main, not 'main'"),
    ],
)
def test_a_wrong_mix_gives_a_one_line_error(text, words) -> None:
    with pytest.raises(UserError, match=words):
        override(BASE, [f"data.mix={text}"])


def test_a_wrong_mix_in_a_config_file_gives_a_one_line_error() -> None:
    for source, words in [
        (Source("a", "a.txt", 0.1), "data.mix.paths must be a tuple of strings, not 'a.txt'"),
        (Source("a", ("a.txt",), 0.1, row="hooks"), "data.mix.row must be MODULE:FUNCTION, not 'hooks'"),
        (Source("a", ("a.txt",), "5%"), "data.mix.share must be a number, not '5%'"),
        (Source("a", ("a.txt",), 0.1, fields={"txt": "b"}), "`fields` of a: unknown key 'txt'; did you mean text?"),
    ]:
        data = dataclasses.replace(BASE.data, mix=(source,))
        with pytest.raises(UserError, match=words):
            override(dataclasses.replace(BASE, data=data), [])
    with pytest.raises(UserError, match="data.mix must be a tuple of Sources"):
        override(dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, mix=("a.txt",))), [])
