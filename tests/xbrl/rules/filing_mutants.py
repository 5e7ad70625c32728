"""Hold the reader and the filing rules to the files with which xbridge tests its validator (github.com/Meaningful-Data/xbridge).

    pip install eba-xbridge==2.0.1 pytest                                                 # in another environment
    MUTANTS=DIR PYTHONPATH=tests/xbrl/rules python -m pytest -p filing_mutants XBRIDGE/tests  # there: collect the files in DIR
    python -m tests.xbrl.rules.filing_mutants DIR                                         # here: print the table

xbridge's tests write their files at run time. The first command keeps each file, the rule that its test is about, and whether
xbridge finds the rule broken. The files are not part of this repository.
"""

import inspect
import json
import os
import re
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

RULE = re.compile(r"\b(?:XML|CSV|EBA)-[A-Z0-9.]+(?:-\d+)?")
COLUMNS = ("broken", "found", "refused", "not checked", "sound", "wrong")


def keep_files(folder: Path) -> None:
    """Replace xbridge's `run_validation` by one that keeps every file that it is given."""
    from xbridge.validation import _engine  # pyright: ignore[reportMissingImports]

    registry = json.loads(Path(_engine.__file__).with_name("registry.json").read_text(encoding="utf-8"))
    numbers = {rule["code"]: rule["eba_ref"] or "file names" * rule["code"].startswith("EBA-NAME") for rule in registry}
    validate, seen = _engine.run_validation, set()

    def run_validation(file, *args, **options):  # noqa: ANN001, ANN002, ANN003, ANN202
        results = validate(file, *args, **options)
        frames, frame = [], inspect.currentframe()
        while frame := frame and frame.f_back:
            frames += (
                [frame]
                if frame.f_code.co_name.startswith(("test_", "_")) and "tests" in frame.f_code.co_filename
                else []
            )
        named = [str(frame.f_locals.get("rule_id") or frame.f_locals.get("code") or "") for frame in frames]
        named += [rule for frame in frames for rule in RULE.findall(inspect.getsource(frame.f_code))]
        rule = next((name for name in named if numbers.get(name)), "")
        entry = rule, Path(file).read_bytes(), Path(file).name if numbers.get(rule) == "file names" else ""
        if rule and options.get("eba") and entry not in seen:
            seen.add(entry)
            copy = folder / str(len(seen)) / Path(file).name
            copy.parent.mkdir(parents=True)
            copy.write_bytes(entry[1])
            line = {"file": str(copy.relative_to(folder)), "rule": rule, "number": numbers[rule]}
            line["broken"] = rule in {result.rule_id for result in results}
            with (folder / "files.jsonl").open("a", encoding="utf-8") as index:
                index.write(json.dumps(line) + "\n")
        return results

    _engine.run_validation = run_validation


def judge(path: Path, number: str) -> str:
    """Read a file. Return "named" if a finding has the number, "empty" if it has no facts, "refused", else ""."""
    from common.errors import UserError
    from xbrl.read.dpm import load_cells
    from xbrl.read.filing_rules import breaches_of_instance
    from xbrl.read.folder import try_read_report
    from xbrl.read.safety import strict_xml
    from xbrl.rules.quality import check_quality

    with suppress(UserError):
        tree = strict_xml(str(path), path.read_bytes())  # a file without facts is judged by its text alone
        if number in dict(breaches_of_instance(tree)):
            return "named"
    report = try_read_report(path)
    if isinstance(report, str):
        return "empty" if re.search(r"no facts|is empty|no entity", report) else "refused"
    named = {
        finding.legal.removeprefix("EBA filing rules").strip(" ,") for finding in check_quality(report, load_cells())
    }
    return "named" if number in named else ""


def main() -> None:
    """Print one line per rule: the files that break it, and the files that do not."""
    folder = Path(sys.argv[1])
    rules: dict[str, Counter] = defaultdict(Counter)
    for line in map(json.loads, (folder / "files.jsonl").read_text(encoding="utf-8").splitlines()):
        verdict, counts = judge(folder / line["file"], line["number"]), rules[line["number"]]
        if verdict == "empty" or (verdict == "refused" and not line["broken"]):
            counts["empty"] += 1
        elif line["broken"]:
            counts["broken"] += 1
            counts[{"named": "found", "refused": "refused"}.get(verdict, "not checked")] += 1
        else:
            counts["sound"] += 1
            counts["wrong"] += bool(verdict)
            if verdict or "-v" in sys.argv:
                print(line, verdict, file=sys.stderr)
    print("rule", *COLUMNS, "no report", sep=" | ")
    total: Counter = Counter()
    for number in sorted(rules, key=lambda text: [int(part) if part.isdigit() else 99 for part in text.split(".")]):
        total += rules[number]
        print(number, *(rules[number][name] for name in (*COLUMNS, "empty")), sep=" | ")
    print("all", *(total[name] for name in (*COLUMNS, "empty")), sep=" | ")


if __name__ == "__main__":
    main()
elif "MUTANTS" in os.environ:
    keep_files(Path(os.environ["MUTANTS"]))
