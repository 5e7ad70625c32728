"""Private names of torch: each is looked up through `private`, at import, and exists in the installed torch."""

import ast
import re
from pathlib import Path

import pytest

from common.errors import UserError
from common.torch_private import private

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("common", "configs", "data", "distributed", "eval", "model", "scripts", "training", "xbrl")
FILES = [ROOT / "train.py", *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
LOOKED_UP = sorted({name for path in FILES for name in re.findall(r'private\("([^"]+)"\)', path.read_text())})


def uses(tree: ast.Module) -> list[str]:
    """Return the imports from torch, and the attributes of torch, that have a private part."""
    imports = [f"{n.module}.{name.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for name in n.names]
    imports += [name.name for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names]
    attributes = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    return [name for name in imports + attributes if re.match(r"(torch|dist|dcp)\.(\w+\.)*_[a-z]", name, re.I)]


def test_every_private_name_is_looked_up_at_import() -> None:
    assert 0 < len(LOOKED_UP) <= 17  # a new one needs a reason
    found = {f"{path.relative_to(ROOT)}: {use}" for path in FILES for use in uses(ast.parse(path.read_text()))}
    # eval/packed_weights.py asks for these three before it uses them, and packs nothing without them.
    assert {use for use in found if "torch.ops.mkldnn._" not in use} == set()


@pytest.mark.parametrize("name", LOOKED_UP)
def test_installed_torch_has_the_private_name(name) -> None:
    assert private(name) is not None


def test_missing_private_name_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^torch \d+\.\d+.* has no `torch.distributed._gone.Name`, which this project"):
        private("distributed._gone.Name")
