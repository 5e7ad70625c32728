"""A register of information (DORA) as an xBRL-CSV package, in the layout of EBA taxonomy 4.0. Its content is invented."""

import json
import zipfile
from pathlib import Path

EXTENDS = "http://www.eba.europa.eu/eu/fr/xbrl/crr/fws/dora/4.0/mod/dora.json"
NAME = "SYNB00AAAAAAAAAAAA11.CON_DE_DORA010100_DORA_2025-12-31_20260415093000000"
LEI, CLOUD = "SYNB00AAAAAAAAAAAA11", "SYNP00CCCCCCCCCCCC33"
TABLES = {
    "b_01.01": [
        "c0010,c0020,c0030,c0040,c0050,c0060",
        f"{LEI},Nordhaven Bank,eba_GA:DE,eba_CT:x12,Example Authority,2026-04-15",
    ],
    "b_01.02": [
        "c0010,c0020,c0030,c0040,c0050,c0060,c0070,c0080,c0090,c0100,c0110",
        f"{LEI},Nordhaven Bank,eba_GA:DE,eba_CT:x12,eba_RP:x53,{LEI},2026-04-15,2020-01-01,9999-12-31,eba_CU:EUR,81250000000",
    ],
    "b_01.03": ["c0010,c0020,c0030,c0040"],
    "b_02.01": [
        "c0010,c0020,c0030,c0040,c0050",
        "4711,eba_CO:x1,,eba_CU:EUR,1250000.50",
        '"2024-002, cloud",eba_CO:x3,4711,eba_CU:EUR,#nil',
    ],
    "b_02.02": [
        "c0010,c0020,c0030,c0040,c0050,c0060,c0070,c0080,c0090,c0100,c0110,c0120,c0130,c0140,c0150,c0160,c0170,c0180",
        f"4711,{LEI},{CLOUD},eba_qCO:qx2000,F1,eba_TA:S17,2024-01-01,9999-12-31,,90,180,eba_GA:DE,eba_GA:IE,eba_BT:x28,"
        "eba_GA:IE,eba_GA:IE,eba_ZZ:x793,eba_ZZ:x796",
    ],
    "b_03.01": ["c0010,c0020,c0030", f"4711,{LEI},true"],
    "b_05.02": [
        "c0010,c0020,c0030,c0040,c0050,c0060,c0070",
        f"4711,eba_TA:S17,{CLOUD},eba_qCO:qx2000,1,{CLOUD},eba_qCO:qx2000",
    ],
    "b_99.01": [
        ",".join(f"c{number:04}" for number in range(10, 200, 10)),
        ",".join(["Standalone contract"] + [""] * 18),
    ],
}


def dora_package(folder: Path, **changes: list[str] | None) -> Path:
    """A zip of `TABLES`. `changes` maps a table such as `b_01.01` to its lines, or to None to omit it."""
    tables = TABLES | changes
    parameters = ["name,value", f"entityID,rs:{LEI}.CON", "refPeriod,2025-12-31", "baseCurrency,iso4217:EUR"]
    parameters += ["decimalsInteger,0", "decimalsMonetary,-3"]
    indicators = ["templateID,reported", *(f"{table.upper()},true" for table in TABLES)]
    files = {name: lines for name, lines in tables.items() if lines is not None}
    path = folder / f"{NAME}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, kind, more in (
            ("META-INF/reportPackage.json", "https://xbrl.org/report-package/2023", {}),
            ("reports/report.json", "https://xbrl.org/2021/xbrl-csv", {"extends": [EXTENDS]}),
        ):
            archive.writestr(f"{NAME}/{member}", json.dumps({"documentInfo": {"documentType": kind, **more}}))
        for name, lines in {"parameters": parameters, "FilingIndicators": indicators, **files}.items():
            archive.writestr(f"{NAME}/reports/{name}.csv", "".join(f"{line}\r\n" for line in lines))
    return path
