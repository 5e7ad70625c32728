"""Make training examples: read report files, evaluate the rules, write the answer.

An example is a JSON object with `messages` (user: the report; assistant: the answer of `answers.py`) and, for the
evaluation, `id`, `bank`, `period`, `split` and

- `violations`: the ids of all violated rules; `engine`: the ids that the engine finds without reading notes;
- `note_facts`: kind, applies, amount, who, since and quote of each fact of the note; `note`: the id of the note, or "";
- `kind`: the kind of the note in the report, "nothing" if it states no fact, or "" without a note;
- `pair`, in tests with minimal pairs: an id shared by two reports that differ in their notes alone.

Only the note comes from the generator. Everything else is read from the files, so that a real archive and an invented one are
processed alike.
"""

import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from xbrl.answers.answers import write_answer, write_facts
from xbrl.answers.profiles import Profile
from xbrl.corpus.note_texts import NO_NOTE, HandNote
from xbrl.desk.letter_context import letter_context
from xbrl.desk.letters import write_letter
from xbrl.read.dpm import Cells
from xbrl.read.filed_report import Report
from xbrl.read.render import Addressee
from xbrl.read.xbrl import merge_reports, read_report
from xbrl.rules.findings import Finding, apply_findings
from xbrl.rules.rules import evaluate, violations


def read_filing(paths: Iterable[pathlib.Path], cells: Cells) -> Report:
    """Read the files that a bank filed for one date, one per module, and merge them into one report.

    Raise `UserError` as `read_report` does.
    """
    return merge_reports([read_report(path, cells) for path in paths])


def make_example(
    report: Report,
    bank: Addressee,
    cells: Cells,
    profile: Profile,
    earlier: Sequence[Report] = (),
    letter: str | None = None,
    findings: Sequence[Finding] = (),
    note: HandNote = NO_NOTE,
) -> dict:
    """Make the training example of one report, in the format of `profile`.

    `earlier` has previous reports of the same bank, oldest first. `letter` is the supervisor's letter; if it is None, a letter is
    written from the blocks. `findings` has the lines of findings.csv on this report; they correct the results of the engine.
    `note` is the bank's note, if its facts are known; the quickstart needs it.
    """
    report, findings = profile.as_seen(report, findings)
    results = evaluate(report, profile.rules)
    violated = apply_findings(results, findings)
    if profile.states_facts_alone:
        answer = write_facts(note.facts)
    else:
        if letter is None:
            context = letter_context(report, results, profile.earlier_shown(earlier), profile.rules, findings)
            letter = write_letter(violated, bank, report.period, context, short=profile.is_short)
        answer = write_answer(violated, letter, note.facts, profile.style)
    entity = report.entity.partition(".")[0]  # without the EBA's suffix for the scope of consolidation
    example = {
        "messages": [*profile.question(report, bank, cells, earlier), {"role": "assistant", "content": answer}],
        "id": f"{entity}-{report.period}",
        "bank": entity,
        "period": report.period,
        "violations": list(dict.fromkeys(result.rule_id for result in violated)),
        "engine": list(dict.fromkeys(result.rule_id for result in violations(results))),
    }
    kind = note.kind if note.id else next((finding.kind for finding in findings if finding.kind), "")
    stated = [asdict(fact) | {"amount": None if fact.amount is None else int(fact.amount)} for fact in note.facts]
    return example | {"kind": kind, "note": note.id, "note_facts": stated}
