"""All ranks compare what they are about to train with, before the first step.

Two nodes may have different files, another config or other libraries. Such a run would train on silently, or hang where one
rank takes a step that another does not have.
"""

import functools
import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Iterable

from common.errors import UserError
from distributed.process_group import Ranks, gather_objects
from distributed.rank_names import ranks_on_hosts

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")
MISSING = "nothing"
WIDTH = 48  # characters of a value in a message
SHOWN = 4  # items, and groups of ranks, in a message


def check_agreement(values: dict[str, object], ranks: Ranks) -> None:
    """Compare `values`, item -> value, on all ranks. A collective, on the CPU.

    A value is anything that JSON can express; give a digest of what is large. A nested dict is compared key by key, under
    "item.key". Raises the same UserError on every rank if any rank differs from rank 0.
    """
    problem = disagreement(gather_objects((socket.gethostname(), flatten(values)), ranks))
    if problem:
        raise UserError(problem)


@functools.cache  # the metadata of a package are long texts, and every start asks for them in several places
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a step computes, for `check_agreement`."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = MISSING
    return versions


def flatten(values: dict[str, object], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` -> `{"a.b": "1"}`: every value as text, nested dicts by dotted keys."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
            flat[f"{prefix}{key}"] = text
    return flat


def disagreement(gathered: list[tuple[str, dict[str, str]]]) -> str | None:
    """The sentence about all ranks that differ from rank 0; None if all agree. `gathered`: (host, values) by rank."""
    first_host, expected = gathered[0]
    groups: dict[str, dict[int, str]] = {}  # what differs -> rank -> host
    for rank, (host, values) in enumerate(gathered):
        pairs = {name: (values.get(name, MISSING), expected.get(name, MISSING)) for name in {**expected, **values}}
        differences = [f"{name} ({_beside(*pair)})" for name, pair in pairs.items() if pair[0] != pair[1]]
        if differences:
            groups.setdefault(_some(differences), {})[rank] = host
    if not groups:
        return None
    verbs = {True: "differs", False: "differ"}
    said = [
        f"{ranks_on_hosts(hosts)} {verbs[len(hosts) == 1]} from rank 0 on host {first_host} in {differences}"
        for differences, hosts in groups.items()
    ]
    return f"{_some(said, '; ')}; give all ranks the same files, config and versions"


def _beside(value: str, other: str) -> str:
    """ "VALUE instead of OTHER"; of long values the part that differs."""
    is_long = max(len(value), len(other)) > WIDTH
    start = max(0, len(os.path.commonprefix([value, other])) - WIDTH // 2) if is_long else 0
    cut = [
        "..." * (start > 0) + text[start : start + WIDTH] + "..." * (text[start + WIDTH :] != "")
        for text in (value, other)
    ]
    return " instead of ".join(cut)


def _some(items: Iterable[str], between: str = ", ") -> str:
    first, *rest = items
    shown = [first, *rest[: SHOWN - 1]] + [f"{len(rest) + 1 - SHOWN} more"] * (len(rest) >= SHOWN)
    return between.join(shown)
