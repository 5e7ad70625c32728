"""Read and write the register of banks: a CSV file with the columns entity, name, country, type."""

import csv
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError
from xbrl.read.render import Addressee
from xbrl.read.xbrl_csv import read_table_of

REGISTER_COLUMNS = ("entity", "name", "country", "type")


def write_register(path: Path, banks: Iterable[Addressee]) -> None:
    """Write a register of banks: a CSV file with the columns entity, name, country, type."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(REGISTER_COLUMNS)
        writer.writerows((bank.entity, bank.name, bank.country, bank.type) for bank in banks)


def read_register(path: Path) -> dict[str, Addressee]:
    """Read a register and return the banks by entity.

    Raise `UserError` as `read_table_of` does, and if an entity occurs twice or has no name.
    """
    register = {}
    for where, row in read_table_of(path, REGISTER_COLUMNS):
        if not row["name"]:
            raise UserError(f"{where}, column name: it is empty; name the bank, or remove the line.")
        if row["entity"] in register:
            raise UserError(f"{where}: entity {row['entity']} occurs twice; remove one of the two lines.")
        register[row["entity"]] = Addressee(*(row[name] for name in REGISTER_COLUMNS))
    return register
