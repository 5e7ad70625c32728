"""A small DPM 2.0 database for the tests of the corpus for continual pre-training."""

import sqlite3
from pathlib import Path

SCHEMA = """
create table Release (Code, Status, ReleaseID); insert into Release values ('3.4', 'released', 1), ('4.2', 'released', 5);
create table Framework (FrameworkID, Name); insert into Framework values (1, 'Liquidity');
create table Module (ModuleID, FrameworkID); insert into Module values (1, 1);
create table ModuleVersion (ModuleVID, ModuleID, Code, StartReleaseID, EndReleaseID);
insert into ModuleVersion values (1, 1, 'LCR_OLD', 1, 5), (2, 1, 'LCR', 5, null);
create table ModuleVersionComposition (ModuleVID, TableVID);
create table "Table" (TableID, IsAbstract);
create table TableVersion (TableVID, TableID, Code, Name, ContextID, StartReleaseID, EndReleaseID);
create table TableVersionHeader (TableVID, HeaderID, ParentHeaderID, HeaderVID, "Order", IsAbstract);
create table Header (HeaderID, Direction, IsKey);
create table HeaderVersion (HeaderVID, Code, Label, ContextID);
create table TableVersionCell (TableVID, CellCode, VariableVID);
create table VariableVersion (VariableVID, PropertyID);
insert into VariableVersion values (1, 1), (2, 2), (3, 3);
create table Property (PropertyID, DataTypeID); insert into Property values (1, 1), (2, 2), (3, 3);
create table DataType (DataTypeID, Code); insert into DataType values (1, 'm'), (2, 'p'), (3, 's');
create table ContextComposition (ContextID, PropertyID, ItemID); insert into ContextComposition values (7, 20, 21), (7, 22, 23), (8, 20, 24);
create table Item (ItemID, Name, Description);
insert into Item values (20, 'Accounting items', null), (21, 'Assets', 'What the institution owns or is owed.'),
  (22, 'Currency', null), (23, 'Euro', 'euro'), (24, 'Liabilities', 'What the institution owes
   to others than its owners.'), (25, 'Later', 'A term that comes with a later release.');
create table Category (CategoryID, Name); insert into Category values (1, 'Accounting terms');
create table ItemCategory (ItemID, CategoryID, StartReleaseID, Signature);
insert into ItemCategory values (21, 1, 1, 'eba_AT:x1'), (23, 1, 1, 'eba_AT:x2'), (24, 1, 5, 'eba_AT:x3'), (25, 1, 9, null);
create table Operation (OperationID, Code, Type);
create table OperationVersion (OperationVID, OperationID, Expression, Description, StartReleaseID, EndReleaseID);
create table OperationScope (OperationVID, IsActive, Severity);
"""


class Maker:
    """A small DPM 2.0 database to which tests add tables and rules."""

    def __init__(self, path: Path) -> None:
        self.database = sqlite3.connect(path)
        self.database.executescript(SCHEMA)
        self.number = 100

    def insert(self, table: str, *values: object) -> None:
        self.database.execute(f'insert into "{table}" values ({",".join("?" * len(values))})', values)

    def table(self, code: str, name: str, headers: list[tuple], cells: dict[str, int], context=None, release=5) -> None:
        """Add a table with `cells` (cell code -> variable).

        Each header is (axis, code, label, index of its parent or None, is heading, is key, context).
        """
        self.number += 1
        table = self.number
        self.insert("Table", table, 0)
        self.insert("TableVersion", table, table, code, name, context, release, None if release == 5 else 5)
        self.insert("ModuleVersionComposition", 2 if release == 5 else 1, table)
        for order, (axis, number, label, parent, heading, key, meaning) in enumerate(headers):
            header = table * 100 + order
            parent = None if parent is None else table * 100 + parent
            self.insert("TableVersionHeader", table, header, parent, header, order, heading)
            self.insert("Header", header, axis, key)
            self.insert("HeaderVersion", header, number, label, meaning)
        for cell, variable in cells.items():
            self.insert("TableVersionCell", table, "{" + f"{code}, {cell}" + "}", variable)

    def rule(
        self, code: str, expression: str, description: str = "", severity: str = "error", release: int = 5
    ) -> None:
        self.number += 1
        self.insert("Operation", self.number, code, "validation")
        end = None if release >= 5 else 5
        self.insert("OperationVersion", self.number, self.number, expression, description, release, end)
        self.insert("OperationScope", self.number, 1, severity)
        self.insert("OperationScope", self.number, 0, "inactive")
