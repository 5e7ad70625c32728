"""Examples for training, made from report files alone: read, decide the rules, write the answer.

An example is one JSON object a line: `messages` (user: the report; assistant: analysis and directive), and for the
evaluation `id`, `bank`, `period`, `violations` (rule ids) and `split`.
"""

import csv
import pathlib
import random
from collections.abc import Iterable, Sequence

from data.regulator.answers import write_answer
from data.regulator.directives import directive
from data.regulator.dpm import Cells
from data.regulator.render import Addressee, render_report
from data.regulator.report import Report
from data.regulator.rules import Rule, evaluate, violations
from data.regulator.xbrl import merge_reports, read_report
from errors import UserError

REGISTER_COLUMNS = ("entity", "name", "country", "type")
SPLITS = ("train", "validation", "test")


def read_filing(paths: Iterable[pathlib.Path], cells: Cells) -> Report:
    """The packages that one bank filed for one date (one per module) as one report. Raises `UserError` as `read_report` does."""
    return merge_reports([read_report(path, cells) for path in paths])


def make_example(
    report: Report,
    bank: Addressee,
    cells: Cells,
    style: str,
    letters: str,
    instruction: str = "",
    rules: Iterable[Rule] | None = None,
) -> dict:
    """The example of one report, without its split. `style` is that of render.py, `letters` that of directives.py."""
    violated = violations(evaluate(report, rules))
    text = render_report(report, cells, style, bank)
    answer = write_answer(violated, directive(violated, bank, report.period, letters), style)
    return {
        "messages": [
            {"role": "user", "content": f"{instruction}\n\n{text}" if instruction else text},
            {"role": "assistant", "content": answer},
        ],
        "id": f"{entity_code(report.entity)}-{report.period}",
        "bank": entity_code(report.entity),
        "period": report.period,
        "violations": [result.rule_id for result in violated],
    }


def entity_code(entity: str) -> str:
    """The LEI without the suffix of the EBA for the scope of consolidation: `SYNB00....CON` -> `SYNB00...`."""
    return entity.partition(".")[0]


def split_banks(banks: Sequence[str], shares: Sequence[float], seed: int) -> dict[str, str]:
    """Bank -> split, every report of a bank in one split. `shares` are of the banks, for train, validation, test.

    Raises `UserError` if they do not add up to 1 or leave a split with a share without a bank.
    """
    if len(shares) != len(SPLITS) or any(share < 0 for share in shares) or abs(sum(shares) - 1) > 1e-9:
        raise UserError(f"the splits {list(shares)} must be three shares (train, validation, test) that add up to 1.")
    order = list(banks)
    random.Random(f"splits {seed}").shuffle(order)
    first = round(len(order) * shares[0])
    second = first + round(len(order) * shares[1])
    parts = dict(zip(SPLITS, (order[:first], order[first:second], order[second:]), strict=True))
    for (split, members), share in zip(parts.items(), shares, strict=True):
        if share > 0 and not members:
            raise UserError(
                f"{len(order)} banks are too few for a share of {share} in {split!r}; ask for more examples."
            )
    return {bank: split for split, members in parts.items() for bank in members}


def write_register(path: pathlib.Path, banks: Iterable[Addressee]) -> None:
    """Write a register of banks: a CSV with the columns entity, name, country, type."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(REGISTER_COLUMNS)
        writer.writerows((bank.entity, bank.name, bank.country, bank.type) for bank in banks)


def read_register(path: pathlib.Path) -> dict[str, Addressee]:
    """Entity -> bank. Raises `UserError` for a missing file, missing columns or an entity given twice."""
    if not path.is_file():
        raise UserError(f"{path}: no such register of banks (a CSV with the columns {','.join(REGISTER_COLUMNS)}).")
    register = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in REGISTER_COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{path}, line 1: the register lacks the column {missing[0]!r}.")
        for row in reader:
            if row["entity"] in register:
                raise UserError(f"{path}, line {reader.line_num}: entity {row['entity']} is there twice.")
            register[row["entity"]] = Addressee(*(row[name] for name in REGISTER_COLUMNS))
    return register
