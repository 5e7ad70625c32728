"""All ranks compare what they are about to train with, before the first step.

Two nodes may have different files, another config or other libraries. Such a run would train on silently, or hang where one
rank takes a step that another does not have.
"""

import functools
import importlib.metadata
import json
import platform
import socket

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
    groups: dict[tuple, dict[int, str]] = {}  # differences -> rank -> host
    for rank, (host, values) in enumerate(gathered):
        names = dict.fromkeys([*expected, *values])
        differences = tuple(
            (name, values.get(name, MISSING), expected.get(name, MISSING))
            for name in names
            if values.get(name) != expected.get(name)
        )
        if differences:
            groups.setdefault(differences, {})[rank] = host
    if not groups:
        return None
    phrases = []
    for number, (differences, hosts) in enumerate(list(groups.items())[:SHOWN]):
        reference = f" from rank 0 on host {first_host}" if number == 0 else ""
        verb = "differs" if len(hosts) == 1 else "differ"
        items = [f"{name} ({_beside(value, other)})" for name, value, other in differences[:SHOWN]]
        items += [f"{len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        phrases.append(f"{ranks_on_hosts(hosts)} {verb}{reference} in {_and(items)}")
    rest = list(groups.values())[SHOWN:]
    if rest:
        phrases.append(f"{sum(map(len, rest))} more ranks differ in other ways")
    return f"{'; '.join(phrases)}; give all ranks the same files, config and versions"


def _beside(value: str, other: str) -> str:
    """ "VALUE instead of OTHER", both cut to the part that differs."""
    same = next((i for i, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), min(len(value), len(other)))
    start = max(0, same - WIDTH // 2) if max(len(value), len(other)) > WIDTH else 0
    return f"{_cut(value, start)} instead of {_cut(other, start)}"


def _cut(text: str, start: int) -> str:
    text = f"...{text[start:]}" if start else text
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def _and(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
