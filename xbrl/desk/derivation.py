"""Prove that a finished letter derives from its sources. A statement without a source keeps the letter back.

The proof reads the text of the letter: addressee, dates, cells, names, citations, terms and every other figure. It looks for the
source of each in the register, the facts of the report, the results of the rules on the cells of the same line, the legal basis
and the approved blocks. Before that it examines the sources that a person or a file could have forged:

- A line of a file for --findings without `note` must agree with the rules. Only an override may differ, and the letter prints it.
- A decision on a note must follow from the note's amount by arithmetic, and amount and quotation must stand in the note. What
  the note means is the decision of a person.
- Register, notes and report must name the same bank.
- A report with an error (`rules/quality.py`: file name, entity, date, unit, sign) decides nothing.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING

from xbrl.desk.decisions import counted, facts_of, is_quoted
from xbrl.desk.letters import Blocks, load_blocks, needs_hearing, plain_name
from xbrl.read.filed_report import Note, Report
from xbrl.read.render import cell_name, round_beside, table_name
from xbrl.read.report_notes import one_line
from xbrl.rules.findings import Finding, apply_findings, can_override, concerns, corrected, csv_line, note_rules
from xbrl.rules.formula import keeps_to
from xbrl.rules.measures import Basis, consequence, load_basis, plan_measures, topic_of
from xbrl.rules.note_facts import (
    LCR,
    SHARE,
    NoteFact,
    amounts_in,
    clients_in,
    connected_shares,
    consequences,
    limit_rule,
    percentages_in,
    stands_in,
)
from xbrl.rules.reported_figures import RECOMPUTED, index_facts, read_figure
from xbrl.rules.rule_lines import STATES, describe_result
from xbrl.rules.rules import RuleResult, violations

if TYPE_CHECKING:
    from xbrl.desk.record import Case, Form
    from xbrl.desk.verdicts import Examination

NAMED_ENTITY = re.compile(r"(?<![A-Z0-9])([A-Z0-9]{18}\d\d)(?:\.([A-Z]+))?(?![A-Z0-9])")
# Findings about the report that the rules judge themselves, or that only a letter without objections cannot stand on
JUDGED = ("MANDATORY", "ACCURACY", "PLAUSIBLE")
CELL = re.compile(r"(?<!\w)[A-Z]{1,2} \d\d\.\d\d(?!\d)(?:\.[a-z])?(?: (?:[^\s;()]*[^\s;(),:.] ){1,12}?c\d{3,4}\b)?")
CITATION = re.compile(r"(?:CRR|CRD) Art\. \d+\w*(?:\(\w+\))*")  # in a block
COUNTING = re.compile(r"[^\W\d]+ ?\d\b(?![.,]?\d|%)")  # `Tier 1` and `CET1`, in a block
CITED = re.compile(r"(?:\w+ )?(?:\bArt\.|§|\bAnnex\b|\bAnhang\b) ?[^\s;]*")  # in a letter
QUOTED = re.compile(r"“([^”]*)”|„([^“]*)“")
FIGURE = r"(?P<number>[-+]?\d+(?:\.\d+)?)(?P<unit> ?%| thousand| million|{points})?"
SCALES = {"": 0, "thousand": 3, "million": 6}  # every other unit is per cent


def unproven(letter: str, case: "Case", engine: "Examination", form: "Form") -> Iterator[str]:
    """Yield a sentence for each statement of the letter, or for each of its sources, that does not derive."""
    report, law = case.report, load_basis(form.basis)
    yield from _disagreements(case)
    yield from _unusable(engine)
    wrong = [*_wrong_decisions(report, engine.results, engine.decisions, law), *_wrong_before(case, law)]
    yield from (f"{sentence}; correct the file for --findings" for sentence in wrong)
    if not wrong:  # a letter on a wrong decision is kept back, and the sentence above names its cause
        yield from _Letter(letter, case, engine, load_blocks(form.language, True), law).problems()


def _disagreements(case: "Case") -> Iterator[str]:
    """Yield a sentence for each disagreement of register, notes and report on the bank."""
    report, bank = case.report, case.report.entity.partition(".")[0]
    if not case.is_registered or case.bank.entity not in (report.entity, bank):
        yield f"{report.entity} is not in the register, which names the addressee: add it, or ask the bank for its LEI"
    for note in report.notes:
        lines = [line for line in case.decisions if line.note == note.id]
        if not _is_about(note, case) and not (lines and all(line.second for line in lines)):
            yield (
                f"note {note.id} names another bank than {case.bank.name} ({note.text[:80]!r}): ask the bank, or confirm the "
                "decision on it with the name of a second person in the column second"
            )


def _is_about(note: Note, case: "Case") -> bool:
    """Return whether a note names no other bank, or this bank too."""
    code = case.report.entity.partition(".")[0]
    others = {match[1] for match in NAMED_ENTITY.finditer(note.text)} - {code}
    others |= {name for name in case.others if stands_in(name, note.text)}
    return not others or any(stands_in(name, note.text) for name in (code, case.bank.name))


def _unusable(engine: "Examination") -> Iterator[str]:
    """Yield a sentence for each error of the report itself (`rules/quality.py`)."""
    for error in engine.about:
        if error.state == "error" or (error.state == "violated" and error.rule_id not in JUDGED):
            yield f"the report has an error ({error.rule_id}, {error.legal}: {error.reason}); ask the bank to file it again"


def _wrong_decisions(
    report: Report, results: Sequence[RuleResult], decisions: Sequence[Finding], law: Basis
) -> Iterator[str]:
    """Yield a sentence for each line that differs from the rules or does not follow from its note."""
    notes = {note.id: note for note in report.notes}
    for line in decisions:
        note, results_of_rule = notes.get(line.note), [result for result in results if concerns(line, result)]
        if line.quote and not (note and is_quoted(line.quote, note)):
            yield f"{line.where}, column quote: these words, at least three, do not stand in the note"
        if (
            line.state == "override"
            and not line.note_rule
            and not any(can_override(line, result) for result in results_of_rule)
        ):
            yield f"{line.where} overrides {line.rule}, which does not apply to this report in that cell, or gets no figures"
        elif line.state == "lifted":
            yield from _wrong_lifting(line, results, decisions, law)
        elif line.state == "violated" and line.rule == "LE_CONNECTED":
            yield from _wrong_group(line, report, note)
        elif line.state == "violated" and not line.note_rule:
            yield from _wrong_annotation(line, results_of_rule, law)
    for note in report.notes:
        own = [line for line in decisions if line.note == note.id]
        benign = next((line for line in own if line.state == "benign"), None)
        finding = next((line for line in own if line.state != "benign"), None)
        if benign and finding:
            yield (
                f"{benign.where} says that nothing follows from a note, and {finding.where} that {finding.rule} does; keep one"
            )
    yield from _wrong_amounts(notes, decisions)
    yield from _wrong_consequences(report, results, decisions, notes)


def _wrong_lifting(
    line: Finding, results: Sequence[RuleResult], decisions: Sequence[Finding], law: Basis
) -> Iterator[str]:
    follows = any(own.rule == line.rule == "LCR_PLEDGED" or own.rule == "PLEDGED_COUNTED" for own in counted(decisions))
    is_found = any(concerns(line, own) for own in violations(results)) or (line.rule == "LCR_PLEDGED" and follows)
    if not is_found:
        yield f"{line.where} lifts {line.rule}, which the rules do not find: if a note changes nothing, decide `benign`"
    elif not line.note:
        yield f"{line.where} lifts {line.rule} without a note: name the note, or write an `override` with its reason"
    elif line.rule not in law.row["lifting"].get(line.legal, ()):
        known = [legal for legal, rules in law.row["lifting"].items() if line.rule in rules]
        yield f"{line.where}, column legal: {line.legal or 'nothing'} does not lift {line.rule}; it is {' or '.join(known) or 'none'}"


def _wrong_before(case: "Case", law: Basis) -> Iterator[str]:
    """Yield a sentence for each line that lifts a rule of an earlier report, so that it does not count as repeated, without a note."""
    notes = {(old.period, note.id) for old in case.earlier for note in old.notes}
    for line in case.decisions:
        is_before = line.state == "lifted" and line.period != case.report.period
        is_proved = (line.period, line.note) in notes and line.rule in law.row["lifting"].get(line.legal, ())
        if is_before and not is_proved:
            yield f"{line.where} lifts {line.rule} in the report as of {line.period} without a note and an article that lift it"


def _wrong_annotation(line: Finding, own: Sequence[RuleResult], law: Basis) -> Iterator[str]:
    """Compare a line on the figures with the rules, which compute value, limit, cell and applicability from the report."""
    same = [result for result in own if result.state == "violated"]
    if any(
        line.value in (None, result.value)
        and line.limit in (None, result.limit)
        and line.legal in ("", result.legal, law.cite(result))
        for result in same
    ):
        return
    computed = "do not apply it to this cell"
    if known := next(iter((*same, *own)), None):
        figures = describe_result(known)
        found = f"{figures['cell']} {figures['value']} {figures['limit']} ({known.legal})"
        computed = f"find {found}: {STATES[known.state]}" if known.value is not None else f"say: {STATES[known.state]}"
    yield f"{line.where} says that {line.rule} is violated and differs from the rules, which {computed}"


def _wrong_group(line: Finding, report: Report, note: Note | None) -> Iterator[str]:
    """Compare a line on connected clients with the clients that the note names and their shares in the report."""
    figures = index_facts(report)
    clients = clients_in(figures, note.text)[:8] if note else []
    for size in range(2, len(clients) + 1):
        for group in itertools.combinations(clients, size):
            connected = connected_shares(figures, NoteFact("connected", True, None, group))
            if isinstance(connected, str):
                continue
            shares, limit = connected
            total = sum((share for _, share in shares), Decimal(0))
            if line.cell in [cell_name(SHARE, row) for row, _ in shares] and line.value == total > limit == line.limit:
                return
    named = ", ".join(clients) or "no client of C 28.00"
    yield f"{line.where}: LE_CONNECTED with {line.cell}, {line.value} and {line.limit} is no group of the note, which names {named}"


def _wrong_amounts(notes: dict[str, Note], decisions: Sequence[Finding]) -> Iterator[str]:
    """Yield a sentence for each decided amount that is not the sum of one amount of each of its notes."""
    for rule in {line.rule: line for line in counted(decisions)}:
        lines = [line for line in counted(decisions) if line.rule == rule]
        own = [notes[name] for name in dict.fromkeys(line.note for line in lines) if name in notes]
        if lines[0].value is None or lines[0].limit is None or lines[0].state == "override":
            continue
        amount = lines[0].value - lines[0].limit
        if amount not in map(sum, itertools.product(*(amounts_in(note.text) for note in own))):
            yield f"{lines[0].where}: the amount {amount:,f} does not stand in the note {', '.join(note.id for note in own)}; correct it, or write an `override`"


def _wrong_consequences(
    report: Report, results: Sequence[RuleResult], decisions: Sequence[Finding], notes: dict[str, Note]
) -> Iterator[str]:
    """Yield a sentence for each decided finding that does not follow from the decided amounts, and for each missing one."""
    rules = note_rules()
    stated = [line for line in decisions if line.is_violation and line.note_rule and line.rule != "LE_CONNECTED"]
    unknown = [rules[line.rule].kind for line in counted(stated) if line.limit is None]
    named = {rules[line.rule].kind: line.note for line in stated}
    follows = {
        finding.rule: replace(finding, entity=report.entity, note=named[finding.kind])
        for finding in consequences(report, results, facts_of(decisions))
        if finding.state == "violated"
    }
    for line in stated:
        right = follows.get(line.rule)
        if right is None and rules[line.rule].kind in unknown:
            if not _states_ratio(line, notes.get(line.note), results):
                yield f"{line.where}: the note does not state {line.value} for {line.cell}, or {line.limit} is not its limit"
        elif right is None:
            yield (
                f"{line.where}: {line.rule} does not follow from the figures of the report and a line that takes the amount out"
            )
        elif line.legal not in ("", rules[line.rule].legal) or any(
            own not in (None, "") and own != expected
            for own, expected in ((line.cell, right.cell), (line.value, right.value), (line.limit, right.limit))
        ):
            yield f"{line.where} does not agree with the figures of the report, by which it is {csv_line(right)}"
    lifted = {line.rule for line in decisions if line.state == "lifted"}
    for rule in sorted(follows.keys() - {line.rule for line in stated} - lifted):
        unless = " (with the state `lifted` and CRR Art. 8 if a waiver covers it)" if rule == "LCR_PLEDGED" else ""
        yield f"{rule} follows from the amounts that are decided, and no line says so: add {csv_line(follows[rule])}{unless}"


def _states_ratio(line: Finding, note: Note | None, results: Sequence[RuleResult]) -> bool:
    """Return whether the note, which states no amount, states the ratio of the line itself, and the rules know its limit."""
    ratio = apply_findings(results, [line])[-1]
    limits = (
        {result.limit for result in results if result.rule_id == limit_rule(ratio)}
        if line.rule != "LCR_PLEDGED"
        else {1}
    )
    cells = [
        cell_name(cell)
        for cell in ((LCR,) if line.rule == "LCR_PLEDGED" else RECOMPUTED)
        if cell[0] in ("C_03.00", LCR[0])
    ]
    stands = note is not None and line.value in percentages_in(note.text)
    return (
        stands
        and line.cell in cells
        and ratio.limit in limits
        and not keeps_to(ratio.known_value, "min", ratio.known_limit)
    )


class _Letter:
    """A finished letter with the sources of its statements."""

    def __init__(self, text: str, case: "Case", engine: "Examination", blocks: Blocks, law: Basis) -> None:
        self.text, self.case, self.engine, self.blocks, self.law = text, case, engine, blocks, law
        report, context = case.report, engine.context
        self.violated = apply_findings(
            [own for own in engine.results if own.state != "not applicable"], engine.decisions
        )
        self.others = [own for own in engine.results if own.state in ("ok", "triggered", "undecided")]
        self.others += [own for line, result in context.overrides for own in (result, corrected(result, line))]
        self.others += context.lifted
        measures = plan_measures(self.violated, context.repeated)
        days = {days for measure in measures for days in (measure.deadline_days, measure.owners_days)}
        self.terms = {blocks.within(number) for number in (*days, law.row["hearing"]["working_days"]) if number}
        self.days = {blocks.day(day) for day in (report.period, case.hearing.day) if day}
        # A name from the register is trusted. Without a register the name is the code that the report gives.
        is_code = case.bank.name == case.bank.entity
        self.addressee = [plain_name(case.bank.name) if is_code else one_line(case.bank.name)]
        names = [*self.addressee, case.hearing.urgent]
        names += [words for line, _ in context.overrides for words in (line.reason, line.second, line.rule)]
        self.names = sorted({one_line(name) for name in names if name}, key=len, reverse=True)
        self.templates = {table_name(name) for name in context.templates}
        fixed = blocks.fixed_texts()
        self.fixed = {blocks.text("binding", name) for name in blocks.words["binding"]}
        self.fixed |= {words for text in fixed for words in COUNTING.findall(text)}
        powers, hearing = law.power_for(measures, is_signed=True), law.row["hearing"]
        laws = [powers, *powers.split("; "), hearing["law"], law.citation("objection")]
        laws += [law.row["objection"].get("at_once", ""), hearing.get("urgent", "") if case.hearing.urgent else ""]
        laws += [law.row["powers"][topic_of(measure)].get("plan", "") for measure in measures]
        announced = consequence(self.violated, context.repeated)
        laws += [law.citation(announced)] if announced != "none" else []
        self.laws = {blocks.law(text) for text in laws}
        self.laws |= {cited for text in fixed for cited in CITATION.findall(text)}
        points = {
            blocks.text("text", "points", number="0", is_one=is_one).removeprefix("0") for is_one in (True, False)
        }
        self.figure = re.compile(FIGURE.format(points="|".join(map(re.escape, sorted(points, key=len, reverse=True)))))
        self.stated: list[RuleResult] = []  # the findings that a line states with value, limit and citation
        self.past = [index_facts(old) for old in case.earlier]
        self.wanting = needs_hearing(measures) and not (case.hearing.day or case.hearing.urgent)

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each statement without a source, and for each violation that the letter leaves out."""
        address, *lines = self.text.splitlines()
        if not any(name in address for name in self.addressee):
            yield f"the letter is not addressed to {self.case.bank.name}"
        findings = [line for line in lines if re.match(r"\d+\. ", line)]
        for number, line in enumerate(findings, start=1):
            yield from self._line(line.removeprefix(f"{number}. "), self.violated)
        for line in (address, *(line for line in lines if line not in findings)):
            yield from self._line(line, self.others)
        for result in self.violated:
            if result not in self.stated:
                yield f"the letter leaves out {result.rule_id} ({self._place(result)}) or its figures; analyse again"
        for result in self.engine.context.untested:
            place = f"{self._place(result)}, {self.blocks.law(self.law.cite(result))}"
            if place not in self.text:
                yield f"the letter does not say that {result.rule_id} was not tested ({place})"
        if self.wanting:
            yield (
                "the letter does not say when the bank was heard: add its line to a file for --hearings, with the day, or with "
                "the reason why the matter is too urgent"
            )

    def _line(self, line: str, results: Sequence[RuleResult]) -> Iterator[str]:
        """Remove each statement that has a source from the line. Yield a sentence for each of the rest."""
        rest, missing = line, []
        modules = [own.cell[0] for own in results if own.cell[0] and not own.cell[2]]
        for text in (*self.names, *modules, *sorted(self.fixed, key=len, reverse=True)):
            rest = rest.replace(text, " ")
        cells = CELL.findall(rest)
        bound = [result for result in results if self._place(result) in line and result.cell[2]]
        bound = bound or [own for own in results if not own.cell[2] or own.state == "triggered"]
        inputs = [part for own in bound for figure in own.inputs for part in (figure, *figure.parts)]
        places = {self._place(own) for own in bound} | {cell_name(own.cell, plain_name(own.row)) for own in inputs}
        places |= self.templates | {name.partition(" r")[0] for name in places}
        places |= {
            table_name(cell[0]) for own in self.violated for cell in (own.cell, *(part.cell for part in own.inputs))
        }
        missing += [cell for cell in cells if cell not in places]
        rest = CELL.sub(" ", rest)
        laws = self.laws | {
            self.blocks.law(text) for own in bound for text in (own.legal, self.law.cite(own), own.guidance)
        }
        for text in sorted(filter(None, laws), key=len, reverse=True):
            rest = re.sub(rf"(?<!\w){re.escape(text)}(?![\w(]|, ?[\d(])", " ", rest)
        missing += CITED.findall(rest)
        rest = CITED.sub(" ", rest)
        rows = {plain_name(own.row) for own in bound}
        missing += [name for pair in QUOTED.findall(rest) if (name := "".join(pair)) not in rows]
        rest = QUOTED.sub(" ", rest)
        pattern = re.escape(self.blocks.text("text", "within", number="\0")).replace("\0", r"[^\W_]+")
        missing += [term for term in re.findall(pattern, rest) if term not in self.terms]
        for day in self.days:
            rest = rest.replace(day, " ")
        figures = list(self.figure.finditer(self.blocks.plain_figures(rest)))
        readings = [Decimal(match["number"]).scaleb(SCALES.get((match["unit"] or "").strip(), -2)) for match in figures]
        known = {number for own in bound for number in self._numbers(own)}
        known.add(Decimal(sum(own.rule_id == "LE_DEF" for own in bound) or -1))  # a remark counts large exposures
        missing += [match[0].strip() for match, own in zip(figures, readings, strict=True) if own not in known]
        for text in dict.fromkeys(missing):
            yield f"the letter says {text!r} in {line[:80]!r}, and no source of it says so; analyse again, or mend the block"
        stated = [own for own in bound if not readings or self._is_stated(own, {*readings})]
        self.stated += [own for own in stated if self.blocks.law(self.law.cite(own)) in line]
        if bound and not stated:
            yield f"the letter does not state figure and limit of {bound[0].rule_id} in {line[:80]!r}; analyse again"

    def _place(self, result: RuleResult) -> str:
        return cell_name(result.cell, plain_name(result.row)) if result.cell[2] else result.cell[0]

    def _is_stated(self, result: RuleResult, stated: set[Decimal]) -> bool:
        """Return whether the figures of a line have the value of a result, unless it is missing, and its limit."""
        has_value = result.missing or result.value in (None, *stated) or result.rule_id == "LE_DEF"
        has_no_limit = result.limit is None or result.rule_id.endswith("_SIGN")  # its block prints no limit
        return has_value and (has_no_limit or bool(stated.intersection(self._limits(result))))

    def _limits(self, result: RuleResult) -> list[Decimal]:
        """Return the limit as it is and as it is printed."""
        if result.limit is None:
            return []
        reference, places = result.value if result in self.violated else None, result.limit_decimals
        return [result.limit, *([round_beside(result.limit, reference, places)[0]] if isinstance(places, int) else [])]

    def _numbers(self, result: RuleResult) -> set[Decimal]:
        """Return the figures that a line on this result may state: value, limit, gap, and the values of earlier reports."""
        numbers: list[object] = [result.value, *self._limits(result)]
        if result.value is not None and result.limit is not None and result in self.violated:
            gap, places = abs(result.value - result.limit), result.limit_decimals
            numbers += [gap, *([round_beside(gap, Decimal(0), places)[0]] if isinstance(places, int) else [])]
        numbers += [] if result.row else [read_figure(old, result.cell).value for old in self.past]
        return {number for number in numbers if isinstance(number, Decimal)}
