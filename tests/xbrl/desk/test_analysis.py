"""Analysis of folders: reports are joined, asked about in batches and analysed again only after a change; exit codes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from tests.xbrl.desk.reports import BANK, CELLS, CET1, HEARD, LCR, NAMED, SMALL, write
from xbrl.answers.profiles import PROFILES
from xbrl.corpus.examples import read_filing
from xbrl.corpus.generate import Request, make_unit, plan_units
from xbrl.desk.analysis import Analysis, Options, choose_profile
from xbrl.desk.record import Case, Form, Reply, make_record
from xbrl.read.filed_report import Note
from xbrl.read.render import Addressee
from xbrl.read.replies import add_replies, write_replies
from xbrl.rules.findings import load_findings

RIGHT = (
    "Note:\nnone\nViolations:\nLCR_MIN | C 76.00.a r0030 c0010 | 93.00% | min 100% | CRR Art. 412(1); Delegated Reg. (EU) 2015/61 "
    "Art. 4(2)\nDirective:\nRestore the ratio."
)


PERIODS = ("2025-12-31", "2026-03-31", "2026-06-30")


def run(tmp_path, files, ask=None, more="", **options):
    lists = {name: tmp_path / f"{name}.csv" for name in ("register", "hearings")}
    heard = [f"{BANK.entity},{period},2026-10-01," for period in PERIODS]
    lists["hearings"].write_text("\n".join(["entity,period,heard,urgent", *heard]))
    all_options = Options((files,), tmp_path / "out", **lists, **options)
    (tmp_path / "register.csv").write_text(f"entity,name,country,type\n{BANK.entity},{BANK.name},ES,bank\n{more}")
    analysis = Analysis(all_options, {"rules": "r"}, {"profile": "full"} if ask else {})
    cases = analysis.prepare()
    for start in range(0, len(cases), 2):
        group = cases[start : start + 2]
        replies = ask(group) if ask else [None] * len(group)
        analysis.write([replace(case, reply=reply) for case, reply in zip(group, replies, strict=True)])
    return analysis.end(), analysis.records


@pytest.fixture
def quarters(tmp_path):
    """Three quarters of one bank, with three files each. In the last quarter the LCR is below its minimum."""
    folder = tmp_path / "files"
    for period, lcr in (("2025-12-31", "1.40"), ("2026-03-31", "1.30"), ("2026-06-30", "0.93")):
        write(folder, {LCR: lcr}, SMALL, period=period)
    assert len(list(folder.iterdir())) == 9
    return folder


def test_modules_are_joined_and_asked_about_in_batches(tmp_path, quarters):
    batches = []

    def ask(cases):
        batches.append([case.report.period for case in cases])
        return [Reply("full", (), RIGHT) for _ in cases]

    code, records = run(tmp_path, quarters, ask)
    assert batches == [["2025-12-31", "2026-03-31"], ["2026-06-30"]] and code == 1
    assert [record["counts"] for record in records] == [{"refuted": 1}, {"refuted": 1}, {"confirmed": 1}]
    assert [record["letter"]["state"] for record in records] == ["ready", "ready", "ready"]
    assert records[2]["earlier"] == ["2025-12-31", "2026-03-31"]
    assert "It has fallen from 130.00% at the previous date." in records[2]["letter"]["text"]
    assert [len(record["files"]) for record in records] == [3, 3, 3]
    first, last = (read_filing(sorted(quarters.glob(f"*{day}*")), CELLS) for day in ("2025-12", "2026-06"))
    (message,) = PROFILES["full"].question(last, NAMED, CELLS, (first,))
    assert "Earlier reports\n2025-12-31: " in message["content"] and "LCR 140.00%" in message["content"]


def test_second_run_redoes_only_changed_reports(tmp_path, quarters, capsys):
    periods = []

    def ask(cases):
        periods.extend(case.report.period for case in cases)
        return [Reply("full", (), RIGHT) for _ in cases]

    def again(files=tmp_path / "moved", **options):
        periods.clear()
        code, _ = run(tmp_path, files, ask, **options)
        written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        return code, [*periods], written

    everything = ["2025-12-31", "2026-03-31", "2026-06-30"]
    code, first, before = again(quarters)
    assert (code, first) == (1, everything)
    assert again(quarters) == (1, [], before) and "0 analysed, 3 unchanged" in capsys.readouterr().out
    shutil.move(quarters, tmp_path / "moved")  # the same files in a different folder are unchanged
    assert again()[1] == []
    changed = write(tmp_path / "moved", {LCR: "1.41"}, SMALL, period="2025-12-31")
    assert again()[1] == everything  # later reports depend on the earlier report
    assert again(draft=True)[1] == again()[1] == everything
    for name in ("report.json", "letter.txt"):  # removed by a person
        next((tmp_path / "out").glob(f"*2026-03-31/{name}")).unlink()
        assert again()[1] == ["2026-03-31"] and list((tmp_path / "out").glob(f"*2026-03-31/{name}"))
    last = next((tmp_path / "out").glob("*2026-03-31"))
    last.rename(f"{last}.tmp")  # as if interrupted just before the rename
    assert again()[1] == ["2026-03-31"] and not list((tmp_path / "out").glob("*.tmp"))
    changed[0].write_text(changed[0].read_text()[:200])
    assert again()[0] == 2
    incomplete = json.loads(next((tmp_path / "out").glob("*2025-12-31/report.json")).read_text())
    reason = next(
        sentence for sentence in incomplete["letter"]["reasons"] if sentence.startswith("the report is incomplete: ")
    )
    assert reason.endswith("; obtain the file again; then analyse again")


def test_client_in_the_register_is_a_name(tmp_path):
    name = "Hansen and Sons Holding"
    write(tmp_path / "files", {("C_28.00", name, "c350"): "0.30"}, SMALL)
    # The register is an input, so the second run analyses the report again.
    for more, state in (("", "not ready"), (f"1,{name},DK,client\n", "ready")):
        (outcome,) = run(tmp_path, tmp_path / "files", more=more)[1]
        assert outcome["letter"]["state"] == state and f"“{name}”: 30.00%" in outcome["letter"]["text"]


def test_decisions_form_and_damaged_files_change_the_result(tmp_path, capsys):
    files = write(tmp_path / "files", {LCR: "0.93"}, SMALL, notes=["Our LCR requirement is waived."])
    code, (outcome,) = run(tmp_path, tmp_path / "files")
    assert (code, outcome["has_findings"], outcome["letter"]["state"]) == (1, True, "not ready")
    decisions = tmp_path / "findings.csv"
    line = f"{BANK.entity},2026-03-31,LCR_MIN,lifted,,CRR Art. 8,{Note('Our LCR requirement is waived.').id}"
    decisions.write_text(f"entity,period,rule,state,cell,legal,note\n{line}\n")
    code, (outcome,) = run(tmp_path, tmp_path / "files", findings=decisions)
    assert (code, outcome["findings"], outcome["letter"]["state"]) == (0, [], "ready")
    assert "Objection: This letter orders nothing." in outcome["letter"]["text"]
    assert outcome["decisions"][0]["state"] == "lifted" and "1 analysed" in capsys.readouterr().out
    assert run(tmp_path, tmp_path / "files", findings=decisions)[0] == 0
    assert "0 analysed, 1 unchanged" in capsys.readouterr().out
    _, (outcome,) = run(tmp_path, tmp_path / "files", form=Form("de", "de"))
    assert "Widerspruch" in outcome["letter"]["text"] and "KWG" in outcome["letter"]["text"]
    with pytest.raises(UserError, match="there is no legal basis 'fr'"):
        run(tmp_path, tmp_path / "files", form=Form("fr"))
    files[0].with_name(files[0].name.replace("COREP", "FINREP")).write_text("{")  # a damaged module is added later
    code, (outcome,) = run(tmp_path, tmp_path / "files", findings=decisions)
    assert code == 2 and outcome["letter"]["reasons"][0].startswith("the report is incomplete: ")
    code, (outcome,) = run(tmp_path, write(tmp_path / "noted", {}, SMALL, notes=["Part of the buffer is pledged."])[0])
    assert (code, outcome["has_findings"], outcome["letter"]["state"]) == (1, False, "not ready")  # a person must act


def test_damaged_outputs_are_written_again(tmp_path):
    """A file with changed content is damaged too."""
    write(tmp_path / "files", {LCR: "0.93"}, SMALL)
    run(tmp_path, tmp_path / "files")
    (folder,) = (tmp_path / "out").glob(f"{BANK.entity}*")
    right = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, damage in (("letter.txt", "To the"), ("report.json", "{}"), ("audit.json", "[]"), ("audit.json", "{}")):
        (folder / name).write_text(damage)
        code, (outcome,) = run(tmp_path, tmp_path / "files")
        assert code == 1 and outcome["letter"]["state"] == "ready"
        assert all((folder / file).read_bytes() == right[file] for file in right if file != "audit.json")


def test_unchanged_file_name_in_any_script_is_recognised(tmp_path, capsys):
    """A name that is not UTF-8 must not look changed in every run, or the model is asked again."""
    names = ("Квартал.json", "تقرير.json", os.fsdecode(b"Gesch\xe4ft.json"))
    for path, name in zip(write(tmp_path / "files", {}, SMALL), names, strict=True):
        path.rename(path.with_name(name))
    for line in ("1 analysed, 0 unchanged", "0 analysed, 1 unchanged"):
        assert run(tmp_path, tmp_path / "files")[0] == 0 and line in capsys.readouterr().out


def test_unnamed_banks_and_ignored_files_are_counted(tmp_path, capsys):
    """A wrong code in the register would address a letter to a code, so the summary counts unnamed banks."""
    write(tmp_path / "files", {}, SMALL, bank=replace(BANK, entity=f"{BANK.entity[:-1]}9"))
    (tmp_path / "files" / "LEI_2026-03-31.7z").touch()
    run(tmp_path, tmp_path / "files")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("not read: 1 files that are no reports by their names, the first ")
    assert lines[3] == f"1 banks are not in {tmp_path / 'register.csv'}; the first: {BANK.entity[:-1]}9.IND"


def test_facts_without_a_cell_print_a_warning(tmp_path, capsys):
    """A report of a later release has no findings, so each run prints the reason, also for an unchanged report."""
    files = Path(shutil.copytree(Path(__file__).parents[1] / "read" / "eba_lcr_sample", tmp_path / "files"))
    table = files / "reports" / "c_76.00.a.csv"
    table.write_text(table.read_text().replace("dp1430", "dp9991430"))
    said = "1 of 35 facts have no cell in the EBA's Data Point Model up to release 4.2 (dp999143076), so no rule reads them; ask the bank what they are"
    for _ in range(2):
        assert run(tmp_path, files)[0] == 1
        assert capsys.readouterr().err.startswith(f"warning: {files}: {said}")


def test_decisions_on_other_reports_are_named(tmp_path, quarters, capsys):
    """A decision with a wrong date or bank is reported."""
    cases = (f"{BANK.entity},2026-03-30", "OTHER,2026-03-31", f"{BANK.entity}.CON,2026-03-31")
    lines = ["entity,period,rule,state,note", *(f"{case},,benign,{16 * '0'}" for case in cases)]
    (tmp_path / "decisions.csv").write_text("\n".join(lines))
    run(tmp_path, quarters, findings=tmp_path / "decisions.csv")
    start = "3 decisions are on reports that are not among these; the first: "
    assert (
        f"{start}{tmp_path / 'decisions.csv'}, line 2, on {BANK.entity} as of 2026-03-30\n" in capsys.readouterr().out
    )


def test_decision_applies_to_one_scope(tmp_path):
    """A waiver of the individual requirement lifts nothing in the consolidated report, which does not have the note."""
    note = "The individual requirement is waived."
    for scope, notes in (("IND", [note]), ("CON", [])):
        write(tmp_path / "files", {LCR: "0.93"}, SMALL, notes, replace(BANK, scope=scope))
    lines = "entity,period,rule,state,cell,legal,note\n{0},2026-03-31,LCR_MIN,lifted,,CRR Art. 8,{1}\n"
    decisions = tmp_path / "decisions.csv"
    decisions.write_text(lines.format(f"{BANK.entity}.IND", Note(note).id))
    _, outcomes = run(tmp_path, tmp_path / "files", findings=decisions)
    states = [
        (len(outcome["findings"]), outcome["letter"]["state"])
        for outcome in sorted(outcomes, key=lambda outcome: outcome["entity"])
    ]
    assert states == [(1, "ready"), (0, "ready")]
    subjects = {outcome["entity"][-3:]: outcome["letter"]["text"].splitlines()[1] for outcome in outcomes}
    start = "Subject: supervisory report as of 31 March 2026"
    assert subjects == {
        "CON": f"{start} (consolidated), decision on measures",
        "IND": f"{start} (individual), no objection",
    }
    decisions.write_text(lines.format(BANK.entity, Note(note).id))
    message = f"line 2, column entity: {BANK.entity} has several reports as of 2026-03-31; add the scope, as in {BANK.entity}.CON"
    with pytest.raises(UserError, match=message):
        run(tmp_path, tmp_path / "files", findings=decisions)


def test_violation_lifted_earlier_is_not_repeated(tmp_path):
    """Violations that a waiver lifted in earlier reports are not counted as repeated."""
    note = Note("Our LCR requirement is waived.")
    for period in PERIODS:
        write(tmp_path / "files", {LCR: "0.89"}, SMALL, [note.text] if period < PERIODS[2] else [], period=period)
    decisions = tmp_path / "decisions.csv"
    lines = [f"{BANK.entity},{period},LCR_MIN,lifted,CRR Art. 8,{note.id}" for period in PERIODS[:2]]
    for lifted, words in ((0, "The two previous reports"), (1, "The previous report showed"), (2, "fallen")):
        decisions.write_text("\n".join(["entity,period,rule,state,legal,note", *lines[:lifted]]) + "\n")
        _, outcomes = run(tmp_path, tmp_path / "files", findings=decisions)
        (last,) = [outcome for outcome in outcomes if outcome["period"] == PERIODS[2]]
        assert last["letter"]["state"] == "ready" and (words in last["letter"]["text"]) == (lifted < 2)
        assert ("showed the same" in last["letter"]["text"]) == (lifted < 2)


def test_monthly_reports_do_not_hide_repeated_violations(tmp_path):
    """Own funds are filed every quarter, the LCR every month. The previous report is the last one with the figure."""
    for period in ("2025-09-30", "2025-10-31", "2025-11-30", "2025-12-31", "2026-01-31", "2026-02-28", "2026-03-31"):
        monthly = int(period[5:7]) % 3
        write(tmp_path / "files", {} if monthly else {CET1: "0.04"}, {LCR: "1.30"} if monthly else None, period=period)
    _, outcomes = run(tmp_path, tmp_path / "files")
    texts = {outcome["period"]: outcome["letter"]["text"] for outcome in outcomes}
    assert (
        "showed the same" not in texts["2025-09-30"] and "The previous report showed the same." in texts["2025-12-31"]
    )
    assert "It is unchanged from the previous date. The two previous reports showed the same." in texts["2026-03-31"]


def test_trend_ignores_other_dates_in_earlier_report(tmp_path):
    """A fact of a different date in the earlier file is no figure of the earlier report."""
    for path in write(tmp_path / "files", {LCR: "1.30"}, SMALL, period="2026-03-31"):
        content = json.loads(path.read_text())
        for name, fact in list(content["facts"].items()):
            earlier_fact = {
                **fact,
                "value": "5.55",
                "dimensions": {**fact["dimensions"], "period": "2025-10-01T00:00:00"},
            }
            content["facts"] |= {f"{name}old": earlier_fact} if fact["value"] == "1.30" else {}
        path.write_text(json.dumps(content))
    write(tmp_path / "files", {LCR: "0.93"}, SMALL, period="2026-06-30")
    _, outcomes = run(tmp_path, tmp_path / "files")
    assert "It has fallen from 130.00% at the previous date." in outcomes[1]["letter"]["text"]


def test_an_entity_with_strange_characters_is_refused(tmp_path, capsys):
    for path in write(tmp_path / "files", {}, SMALL):
        text = path.read_text()
        assert BANK.entity in text
        path.write_text(text.replace(BANK.entity, BANK.entity[:5] + "\\ud800"))
    assert run(tmp_path, tmp_path / "files") == (2, [])
    assert "\\ud800.IND' is no identifier; ask the bank to file the report again" in capsys.readouterr().err


def test_mistakes_are_one_sentence(tmp_path):
    """Among them, an output directory inside the reports: the next run would read its pages as reports."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    files = write(tmp_path / "files", {}, SMALL)
    inside = "lies inside the reports .*; name a directory outside of them"
    for path, out, sentence in (
        (tmp_path / "nothing.xbrl", "out", "nothing.xbrl does not exist"),
        (tmp_path / "empty", "out", "empty contains no reports"),
        (files[0], "file", "--out .*file: "),
        (tmp_path / "files", "files", inside),
        (tmp_path / "files", "files/analysis", inside),
    ):
        with pytest.raises(UserError, match=sentence):
            Analysis(Options((path,), tmp_path / out), {}, {}).prepare()
        assert not (tmp_path / out / "index.html").exists()


def test_profile_comes_from_option_export_or_data_card(tmp_path):
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    with pytest.raises(UserError, match="name it with --profile full, short, quickstart"):
        choose_profile(None, export)
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset.json").write_text(json.dumps({"arguments": {"profile": "quickstart"}}))
    config = {"config": {"data": {"train": [str(data / "train.jsonl")]}}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert choose_profile(None, export)[0].name == "quickstart"
    assert choose_profile("full", export)[0].name == "full"


@pytest.mark.parametrize("profile", ["full", "short"])
def test_the_answer_of_an_example_is_confirmed(tmp_path, profile):
    """For reports of the corpus the prompt is the prompt of training, and the right answer is neither refuted nor incomplete.

    With the decisions that the page prints, engine, person and answer agree, and the draft contains only blocks.
    """
    request = Request(60, 3, profile, [0.8, 0.1, 0.1])
    units = [unit for unit in plan_units(request) if unit.quarters == 1 and not unit.pair]
    decided = 0
    with_note, without_note = ([unit for unit in units if bool(unit.note) == has_note] for has_note in (True, False))
    for unit in with_note[:10] + without_note[:2]:
        generated = make_unit(tmp_path, request, unit)
        (filing,), (example,) = generated.filings, generated.examples
        write_replies(tmp_path / "replies.csv", filing.replies)
        ((report,), unknown) = add_replies([read_filing(generated.files, CELLS)], generated.files)
        assert unknown == []
        bank = Addressee(filing.bank.entity, filing.bank.name, filing.bank.country, filing.bank.model)
        *prompt, answer = example["messages"]
        assert PROFILES[profile].question(report, bank, CELLS, ()) == prompt and PROFILES[profile].why_not(report) == ""
        reply = Reply(profile, tuple(prompt), answer["content"])
        first = make_record(Case(report, bank, reply=reply, hearing=HEARD))
        assert {entry["verdict"] for entry in first["findings"]} <= {
            "confirmed",
            "not decidable by rule",
            "not covered",
        }
        assert first["refuted_facts"] == [] and (first["letter"]["state"] == "ready" or unit.note)
        lines = [line for note in first["notes"] for line in note["if_so"] or [note["if_not"]]]
        (tmp_path / "decisions.csv").write_text("\n".join([first["columns"], *lines]) + "\n")
        decisions = load_findings(tmp_path / "decisions.csv") if lines else {}
        own = next(iter(decisions.values()), ())
        final = make_record(Case(report, bank, decisions=own, reply=reply, hearing=HEARD))
        if any("does not stand in the note" in reason for reason in final["letter"]["reasons"]):
            confirmed = {"state": "override", "reason": "a share that the note names", "second": "M. Weber"}
            own = [replace(line, **confirmed if line.note_rule and line.note_rule.counted else {}) for line in own]
            final = make_record(Case(report, bank, decisions=tuple(own), reply=reply, hearing=HEARD))
            assert "Confirmed by M. Weber." in final["letter"]["text"]
            final["draft"]["outside"] = []  # the model's letter has no override
        assert final["letter"]["state"] == "ready", final["letter"]["reasons"]
        covered = "not covered" not in final["counts"]  # otherwise the decision orders more than the profile covers
        assert final["draft"]["outside"] == [] or not covered
        assert {entry["verdict"] for entry in final["findings"]} <= {"confirmed", "not covered"}
        # Short answers name a violation in one line and lift it in another.
        lifted = {entry["rule"] for entry in final["decisions"] if entry["state"] == "lifted"}
        named = {entry["rule"] for entry in final["findings"] if entry["verdict"] == "confirmed"} - lifted
        assert named == set(example["violations"])
        decided += bool(named)
    assert decided >= 4
