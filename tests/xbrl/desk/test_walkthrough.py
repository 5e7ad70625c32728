"""The commands of docs/xbrl.md print the lines on the page, and LOG.md has the letter to the byte."""

import re
from pathlib import Path

from xbrl.corpus.generate import Request, make_unit, plan_units
from xbrl.desk.analysis import Options, analyse
from xbrl.read.replies import write_replies
from xbrl.rules.findings import write_findings

ROOT = Path(__file__).resolve().parents[3]
PAGE, LOG = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("xbrl.md", "LOG.md"))
QUICKSTART = Request(696, 0, "quickstart", [544 / 696, 40 / 696, 112 / 696])
CASE = 590  # index of the walkthrough's bank among the units of the corpus
SAID = re.findall(r"^    (\d+ (?:report|analysed).*)$", PAGE.partition("## From an empty machine")[0], re.MULTILINE)
LETTER = re.compile(
    r"^    To the Management Board of Birksee.*?^    Date and signature: _+\n", re.MULTILINE | re.DOTALL
)


def test_the_commands_print_what_the_page_says(tmp_path, capsys):
    generated = make_unit(tmp_path, QUICKSTART, plan_units(QUICKSTART)[CASE])
    bank = generated.filings[0].bank
    files, decisions, register = tuple(generated.files), tmp_path / "decisions.csv", tmp_path / "register.csv"
    write_findings(decisions, generated.findings)
    write_replies(tmp_path / "replies.csv", generated.filings[0].replies)
    register.write_text(f"entity,name,country,type\n{bank.entity},{bank.name},{bank.country},{bank.model}\n")
    hearings = tmp_path / "hearings.csv"
    hearings.write_text(
        re.search(r"printf '(entity,period,heard,urgent.*)' > hearings.csv", PAGE)[1].replace("\\n", "\n")
    )
    sample = (ROOT / "tests/xbrl/read/eba_lcr_sample",)
    options = (
        Options(sample, tmp_path / "sample"),
        Options(files, tmp_path / "out", register=register),
        Options(files, tmp_path / "out", register=register, findings=decisions, hearings=hearings),
    )
    assert [analyse(each) for each in options] == [1, 1, 1]
    printed = [line for line in capsys.readouterr().out.splitlines() if "index.html" not in line]
    assert len(SAID) == 4 and [printed[0], printed[1], printed[2], printed[4]] == SAID
    assert f'The note says: "{generated.examples[0]["messages"][1]["content"].partition("Note: ")[2]}"' in PAGE
    letter = next((tmp_path / "out").glob("*/letter.txt")).read_text(encoding="utf-8")
    shown = PAGE.partition("From `letter.txt`:\n")[2].partition("\n[LOG.md]")[0]
    lines = [line.strip().removesuffix("...").strip() for line in shown.splitlines()]
    assert len(lines) > 4 and all(line in letter for line in lines)
    whole = LETTER.search(LOG)
    assert whole and re.sub("^    ", "", whole[0], flags=re.MULTILINE) == letter
