"""The tables of the register of information on ICT contracts (DORA), as their xBRL-CSV files are laid out.

Each table file has one column per column of the template (`c0010`, `c0020`, ...) and one row per entry. Some columns are
the key of the row: the values of the dimensions that all facts of the row share. The others are one fact each.

Sources: Implementing Regulation (EU) 2024/2956, Annex I (the templates); EBA taxonomy 4.0, module DORA, and EBA DPM 4.2 (key
columns with their dimensions, data types).
"""

# Table -> its key columns and their dimensions. A table without a key has a single row, `FIXED_ROWS`.
KEY_COLUMNS: dict[str, dict[str, str]] = {
    "B_01.01": {"c0010": "ERI"},
    "B_01.02": {"c0010": "ESI"},
    "B_01.03": {"c0010": "ISB", "c0020": "LHH"},
    "B_02.01": {"c0010": "CRZ"},
    "B_02.02": {
        "c0010": "CRZ",
        "c0020": "qLES",
        "c0030": "ICT",
        "c0050": "IOB",
        "c0060": "TYA",
        "c0130": "qNNB",
        "c0150": "qNMP",
        "c0160": "qNMR",
    },
    "B_02.03": {"c0010": "CRN", "c0020": "CRD"},
    "B_03.01": {"c0010": "CRZ", "c0020": "qLEA"},
    "B_03.02": {"c0010": "CRZ", "c0020": "ICT"},
    "B_03.03": {"c0010": "CRZ", "c0020": "qLEB"},
    "B_04.01": {"c0010": "CRZ", "c0020": "qLES", "c0040": "ISB"},
    "B_05.01": {"c0010": "ICT"},
    "B_05.02": {"c0010": "CRZ", "c0020": "TIC", "c0030": "ICT", "c0050": "ii1713", "c0060": "si1456"},
    "B_06.01": {"c0010": "IOB", "c0040": "qLES"},
    "B_07.01": {"c0010": "CRZ", "c0020": "ICT", "c0040": "TIC"},
    "B_99.01": {},
}
FIXED_ROWS = {"B_99.01": "r0040"}
# (table, column) -> data type of the DPM. All other columns are text: names, codes, dates, members of a list.
COLUMN_TYPES: dict[tuple[str, str], str] = {
    ("B_01.02", "c0110"): "monetary",  # total assets
    ("B_02.01", "c0050"): "monetary",  # annual expense of the contract
    ("B_02.02", "c0100"): "integer",  # notice period of the entity, days
    ("B_02.02", "c0110"): "integer",  # notice period of the provider, days
    ("B_02.03", "c0030"): "true",  # the contracts are linked
    ("B_03.01", "c0030"): "true",  # the entity signs the contract, as a recipient
    ("B_03.03", "c0031"): "true",  # likewise, as a provider
    ("B_05.01", "c0100"): "monetary",  # annual expense for the provider
    ("B_06.01", "c0080"): "integer",  # recovery time objective, hours
    ("B_06.01", "c0090"): "integer",  # recovery point objective, hours
}
