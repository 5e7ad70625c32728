"""The names of ranks, hosts and times in messages: "rank 1 on host b", "ranks 8-15 on hosts b, c", "30 minutes"."""

from collections.abc import Iterable


def name_ranks(ranks: Iterable[int]) -> str:
    """Return ranks in words: `[3]` -> "rank 3", `[0, 1, 2, 5]` -> "ranks 0-2, 5"."""
    numbers = sorted(ranks)
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'' if len(numbers) == 1 else 's'} {text}"


def ranks_on_hosts(hosts: dict[int, str]) -> str:
    """Return ranks with their hosts in words: `{8: "b", 9: "b"}` -> "ranks 8-9 on host b". At most four hosts are named."""
    names = list(dict.fromkeys(hosts[rank] for rank in sorted(hosts)))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{name_ranks(hosts)} on host{'' if len(names) == 1 else 's'} {shown}"


def minutes(seconds: float) -> str:
    """Return a time in words: "30 minutes", or "6 s" below one minute."""
    if seconds < 60:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} minute{'' if seconds == 60 else 's'}"
