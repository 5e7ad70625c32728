"""Each verdict on reports from files: confirmed, refuted, not decidable by rule, missed, not covered."""

from dataclasses import replace
from decimal import Decimal

import pytest

from tests.xbrl.desk.reports import BANK, CLIENT, LCR, LR, NSFR, PERIOD, SMALL, read, record, verdicts
from xbrl.answers.profiles import with_client_names
from xbrl.read.filed_report import Note
from xbrl.rules.findings import Finding, note_rules
from xbrl.rules.note_facts import NAME
from xbrl.rules.rules import evaluate, violations

PLEDGED = "Bonds of 31% of the outflows in the buffer are pledged."
LCR_LINE = (
    "LCR_MIN | C 76.00.a r0030 c0010 | 93.00% | min 100% | CRR Art. 412(1); Delegated Reg. (EU) 2015/61 Art. 4(2)"
)
LE_LINE = "LE_LIMIT | C 28.00 A12 c350 | 27.00% | max 25% | CRR Art. 395(1)"


@pytest.fixture(scope="module")
def breach(tmp_path_factory):
    """A report with an LCR of 93% and an exposure to client A12 of 27% of Tier 1."""
    return read(tmp_path_factory.mktemp("breach"), {LCR: "0.93", CLIENT: "0.27"})


def judge(report, *lines, **options):
    outcome = record(report, "\n".join(["Violations:", *lines, "Directive:", "x"]), **options)
    return outcome, {finding["rule"]: finding for finding in outcome["findings"]}


def read_note(report, *facts, **options):
    """Judge an answer of the quickstart, which states facts alone."""
    outcome = record(report, "\n".join(["Note:", *facts]), "quickstart", **options)
    return outcome, {finding["rule"]: finding for finding in outcome["findings"]}


def decision(rule, state, value=None, limit=None, legal="", note=PLEDGED):
    low, high = (None if number is None else Decimal(number) for number in (value, limit))
    fields = (BANK.entity, PERIOD, rule, state, "C 76.00.a r0030 c0010", low, high, legal, "pledged", Note(note).id)
    return Finding(*fields, where="findings.csv, line 2")


def test_confirmed_with_cell_formula_inputs_limit_and_article(breach):
    outcome, by_rule = judge(breach, LCR_LINE, LE_LINE)
    assert verdicts(outcome) == [("confirmed", "LCR_MIN"), ("confirmed", "LE_LIMIT")]
    lcr, client = by_rule["LCR_MIN"], by_rule["LE_LIMIT"]
    assert (lcr["cell"], lcr["value"], lcr["limit"]) == ("C 76.00.a r0030 c0010", "93.00%", "min 100%")
    assert lcr["details"] == [
        "violated if C 76.00.a r0030 c0010 < 1",
        "C 76.00.a r0030 c0010 = 93.00%",
        f"the model wrote: {LCR_LINE}",
    ]
    assert (client["cell"], client["value"], client["limit"]) == ("C 28.00 A12 c350", "27.00%", "max 25%")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (LCR_LINE.replace("93", "94"), "the value is 93.00%, not 94%"),
        (LCR_LINE.replace("100%", "105%"), "the limit is min 100%, not min 105%"),
        (LCR_LINE.replace("100%", "14000%"), "the limit is min 100%, not min 14000%"),
        (LCR_LINE.replace("412(1)", "413(1)"), "the model cites 2015/61 4(2), CRR 413(1)"),
        (LCR_LINE.replace("r0030", "r0020"), "violated at C 76.00.a r0030 c0010, not where the model says"),
        (LCR_LINE.replace("LCR_MIN", "NSFR_MIN"), "the figures meet the rule"),
        (LCR_LINE.replace("LCR_MIN", "LCR_MAX"), "no rule has this id"),
        (LCR_LINE.replace("LCR_MIN", "OF_SUM"), "C 01.00 has no filing indicator"),
        (LCR_LINE.replace("LCR_MIN", "LCR_PLEDGED"), "the report has none"),
    ],
)
def test_refuted_with_the_reason_and_the_right_figure(breach, line, reason):
    outcome, _ = judge(breach, line, LE_LINE)
    (refuted,) = [finding for finding in outcome["findings"] if finding["verdict"] == "refuted"]
    assert reason in refuted["reason"] and refuted["line"] == line


def test_finding_on_another_client_is_refuted(breach, tmp_path):
    outcome, by_rule = judge(breach, LCR_LINE, LE_LINE.replace("A12", "B34"))
    assert verdicts(outcome) == [("confirmed", "LCR_MIN"), ("refuted", "LE_LIMIT"), ("missed", "LE_LIMIT")]
    assert by_rule["LE_LIMIT"]["cell"] == "C 28.00 A12 c350"
    outcome, by_rule = judge(read(tmp_path, {LCR: "0.93"}), LCR_LINE, LE_LINE.replace("A12", "B34"))
    assert verdicts(outcome) == [("confirmed", "LCR_MIN"), ("refuted", "LE_LIMIT")]
    client = by_rule["LE_LIMIT"]
    assert (client["cell"], client["value"], client["limit"]) == ("C 28.00 * c350", "", "")
    assert client["reason"] == "the figures meet the rule" and "A12" not in " ".join(client["details"])


def test_facts_alone_are_a_proposal(tmp_path):
    noted = read(tmp_path, figures=SMALL, notes=[PLEDGED])
    fact = '"Bonds of 31% of the outflows in the buffer are pledged" | pledged | applies | - | - | -'
    outcome, by_rule = read_note(noted, fact)
    assert verdicts(outcome) == [("not decidable by rule", "PLEDGED_COUNTED")]
    assert "follows from the facts that the model read" in by_rule["PLEDGED_COUNTED"]["reason"]
    assert outcome["letter"]["state"] == "not ready"
    outcome, by_rule = read_note(noted, fact, decisions=[decision("LCR_PLEDGED", "violated", "0.99", "1")])
    assert verdicts(outcome) == [("found by rule", "LCR_PLEDGED")]
    assert by_rule["LCR_PLEDGED"]["reason"] == "the desk has decided that it is violated (findings.csv, line 2)"
    assert by_rule["LCR_PLEDGED"]["title"] == note_rules()["LCR_PLEDGED"].title
    outcome, _ = read_note(noted, fact, decisions=[decision("", "benign")])
    assert verdicts(outcome) == []
    outcome, _ = read_note(noted, "pledged, surely")
    assert verdicts(outcome) == [] and "lines of the section Note" in outcome["draft"]["problems"][0]
    assert read_note(noted)[0]["draft"]["problems"] == []


def test_waiver_read_in_a_note_leaves_the_violation_open(tmp_path):
    note = "Our LCR requirement is waived until 2027-12-31."
    report = read(tmp_path, {LCR: "0.93"}, SMALL, notes=[note])
    fact = '"Our LCR requirement is waived until 2027-12-31" | waiver | applies | - | - | -'
    outcome, by_rule = read_note(report, fact)
    assert verdicts(outcome) == [("not decidable by rule", "LCR_MIN")]
    assert "the model read in the note that this limit does not bind" in by_rule["LCR_MIN"]["reason"]
    for state, verdict in (("lifted", []), ("benign", [("not decidable by rule", "LCR_MIN")])):
        lines = [decision("LCR_MIN", state, legal="CRR Art. 8", note=note)]
        assert verdicts(read_note(report, fact, decisions=lines)[0]) == verdict
    assert verdicts(read_note(report, fact.replace("applies", "does not apply"))[0]) == [("found by rule", "LCR_MIN")]


def test_findings_outside_the_profile_are_listed(tmp_path):
    report = read(tmp_path, {LR: "0.02", NSFR: "0.99"}, SMALL)
    outcome, _ = read_note(report, "none")
    assert verdicts(outcome) == [("found by rule", "LR_MIN"), ("not covered", "NSFR_MIN")]


def test_decision_on_another_client_gives_no_reason(breach):
    unrelated = decision("LE_LIMIT", "violated", "0.3", "0.25", "CRR Art. 395(1)")
    unrelated = replace(unrelated, cell="C 28.00 B34 c350", kind="", note="")
    lines = [LE_LINE, LE_LINE.replace("A12", "B34").replace("27.00", "30.00")]
    outcome, _ = judge(breach, LCR_LINE, *lines, decisions=[unrelated])
    reasons = {finding["cell"]: (finding["verdict"], finding["reason"]) for finding in outcome["findings"]}
    assert reasons["C 28.00 A12 c350"] == ("confirmed", "")
    assert reasons["C 28.00 B34 c350"] == ("confirmed", "the desk has decided: violated (findings.csv, line 2)")


def test_clients_of_one_name_keep_their_codes(breach):
    """A short report names its clients. Two clients of one name keep their codes, so each has its own row and finding."""
    first = next(fact for fact in breach.facts if fact.cell == CLIENT[:1] + ("*",) + CLIENT[2:])
    first = replace(first, value="Nordwerk", unit=None, decimals=None, cell=NAME)
    key = next(name for name in first.dimensions if name.endswith("qINC"))
    names = [replace(first, dimensions={key: code}) for code in ("A12", "B34")]
    for count, row in ((2, "Nordwerk (A12)"), (1, "Nordwerk")):
        report, _ = with_client_names(replace(breach, facts=(*breach.facts, *names[:count])))
        assert [result.row for result in violations(evaluate(report)) if result.rule_id == "LE_LIMIT"] == [row]
