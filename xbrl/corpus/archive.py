"""Make training examples from a supervisor's archive: report files, and the directive letters that answered them.

A letter belongs to the reports of one bank for one reference date, which it names in its file name or first lines, or a CSV
file of pairs assigns it. What has no counterpart is listed with the reason, and a report with missing figures is left out,
because the rules would mislabel it.

Letters are compared with the violations of their reports, to find wrong pairs, missing findings and waivers. The comparison
prefers what can be checked: articles, cells, ids of rules, figures. It does not understand the letter: words such as "no
objection" count only in a letter that demands nothing, and a sentence is taken as an objection unless it says in the words of
`MET` that a requirement is met. Citations and words are known in English and German.
"""

import datetime
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import accumulate
from pathlib import Path

from common.durable_files import new_directory, write_durably
from common.errors import UserError
from xbrl.answers.answers import write_violation
from xbrl.answers.statements import articles, sentences
from xbrl.corpus.card import SPLITS, check_counts, check_shares, group_by_split, write_splits
from xbrl.corpus.examples import FULL, make_example, read_register
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import Report
from xbrl.read.folder import find_reports, join_modules, read_files
from xbrl.read.render import Addressee, cell_name
from xbrl.read.safety import is_clutter
from xbrl.read.xbrl_csv import read_table_of
from xbrl.rules.findings import Finding, apply_findings, load_findings, note_rules
from xbrl.rules.rules import RuleResult, built_in_rules, evaluate, violations

LETTER_SUFFIXES = (".txt", ".md")
HEAD_LINES = 12  # lines of a letter that are searched when its file name does not identify the report
GERMAN_MONTHS = (
    "Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September", "Oktober", "November", "Dezember",
)  # fmt: skip
Case = tuple[str, str]  # (entity without its scope suffix, reference date YYYY-MM-DD)
Article = tuple[str, str]  # as `statements.articles`
HOW_MADE = (
    "scripts/regulator.py examples: report files of an archive, paired with their letters, labelled by xbrl/rules/rules.jsonl "
    "and by findings.csv."
)
LIMITS = (
    "Made from a supervisor's own archive. The violations are those that xbrl/rules/rules.jsonl finds in the reported "
    "figures, corrected by findings.csv if one was given, not those that the letters name: disagreements.txt lists where "
    "the two contradict each other, as far as articles, cells and figures show it."
)

# Articles on powers, sanctions and duties to report: a letter cites them whatever was found.
POWERS = {
    "CRD": ("4", "18", "64", "65", "66", "67", "70", "102", "104", "105", "141", "142", "143"),
    "CRR": ("4", "99", "394", "415", "430"),
}
MET = re.compile(
    r"\b(is|are|was|were|remains?|be) (also |still )?(met|satisfied|fulfilled|observed|complied with)\b"
    r"|\b(meets?|satisf(y|ies)|compl(y|ies|ied) with)\b|\beingehalten\b|\berfüllt\b"
    r"|\b(no|keine?n?) (violation|breach|infringement|measures?|action|Verstoß|Maßnahmen?)\b",
    re.IGNORECASE,
)
CELL = re.compile(r"\b[CF] ?\d\d\.\d\d(\.\w)? r\d{3,4} c\d{3,4}\b")
# A line on requirements that are met, or that the figures do not decide.
NO_OBJECTION = re.compile(r"\bsmallest margin\b|\bkleinste Abstand\b|^Not tested\b|^Nicht geprüft\b", re.IGNORECASE)
NOT_MET = re.compile(r"\b(not|nor|never|fail(s|ed)?|misse[sd]|below|until|nicht|unter)\b", re.IGNORECASE)
# Of differences in percentage points, none.
PERCENTAGE = re.compile(r"(?<![\d.,])(-?\d+(?:[.,]\d+)?) ?(?:%|per ?cent\b|Prozent\b)(?! ?(?:points?|-?[Pp]unkte?)\b)")
APPROVAL = re.compile(
    r"\bnothing to object|\bno (further )?(supervisory )?(objections?|findings|measures?|action)\b|\bno need for action"
    r"|\bwithout (findings|objections?)\b|\bkeine (Beanstandung|Maßnahme|Einwände|Feststellung)",
    re.IGNORECASE,
)
DEMAND = re.compile(
    r"\b(shall|must|is to|are to|has to|have to)\b|\bwe (hereby )?(order|direct|require|instruct)\b"
    r"|\bwithin \S+ (\S+ )?(days?|weeks?|months?)\b|\b(re)?submit\b|\brestore\b|\binnerhalb von\b|\bordnen wir an\b",
    re.IGNORECASE,
)


def make_archive_corpus(
    places: Mapping[str, Path | None],
    out: Path,
    shares: Sequence[float],
    seed: int,
    processes: int,
    record: dict[str, str],
) -> None:
    """Read the archive and write the corpus: a file per split, unmatched.txt, disagreements.txt, dataset.json.

    `places`: the directories `reports` and `letters`; `pairs` (a CSV with the columns report,letter), `register` (with
    entity,name,country,type) and `findings` (findings.csv, annotated by a supervisor), or None. `record`: the arguments that
    the data card shows. Prints what was used, and on stderr what was not. Raises UserError if a directory is missing, or if
    no report has a letter.
    """
    folder, letter_folder = (Path(places[name] or "") for name in ("reports", "letters"))
    for option, one in (("--reports", folder), ("--letters", letter_folder)):
        if not one.is_dir():
            raise UserError(f"{option} {one}: no such directory.")
    register = read_register(places["register"]) if places["register"] else {}
    findings = load_findings(places["findings"]) if places["findings"] else {}
    reports, unread = read_reports(folder, processes)
    texts, without_report = find_letters(letter_folder)
    if places["pairs"]:
        letters, others = pair_letters(read_pairs(places["pairs"], folder, letter_folder), texts, reports)
    else:
        letters, others = match_letters(texts, reports, {entity: bank.name for entity, bank in register.items()})
    without_report += others
    without_letter = [f"{entity} {period}: no letter" for entity, period in reports if (entity, period) not in letters]
    examples, disagreements, unused = _make_examples(reports, letters, texts, register, findings)
    if not examples:
        reasons = (unread + without_report + without_letter)[:3]
        raise UserError(f"{folder}: no report has a letter; the first reasons: {'; '.join(reasons)}")
    unmatched = {
        "reports and files left out": unread,
        "letters without a report": without_report,
        "reports without a letter": without_letter,
        "findings that change nothing": unused,
    }
    split_of = split_banks(sorted({example["bank"] for example in examples}), shares, seed)
    more = {
        "unmatched": {title: len(lines) for title, lines in unmatched.items()},
        "disagreements": len(disagreements),
        "warnings": sum(len(report.warnings) for report in reports.values()),
    }
    unmatched_lines = [f"{title}: {line}" for title, lines in unmatched.items() for line in lines]
    with new_directory(out) as draft:
        splits = group_by_split(examples, [split_of[example["bank"]] for example in examples])
        card = write_splits(draft, splits, record, (HOW_MADE, LIMITS), more)
        write_durably(draft / "unmatched.txt", "".join(line + "\n" for line in unmatched_lines))
        write_durably(draft / "disagreements.txt", "".join(line + "\n" for line in disagreements))
    for line in (*unmatched_lines, *(f"letter and labels disagree: {line}" for line in disagreements)):
        print(line, file=sys.stderr)
    for split, counts in card["splits"].items():
        print(f"{split:17} {counts['examples']:6} reports of {counts['banks']} banks, {counts['clean']} clean")
    print(f"{len(examples)} reports with a letter; unmatched: {card['unmatched']}; disagreements: {len(disagreements)}")


def read_reports(folder: Path, processes: int) -> tuple[dict[Case, Report], list[str]]:
    """(case -> its modules as one report, a line for each file and report that cannot be used)."""
    files, others = find_reports(folder)
    if not files:
        raise UserError(f"{folder}: the directory has no report file; check --reports.")
    lines = [f"{path}: not a report by its name" for path in others]
    read, refused = read_files(files, processes)
    lines += refused.values()
    reports: dict[Case, Report] = {}
    scopes: dict[Case, str] = {}
    for report in join_modules(read, refused):
        case = (report.entity.partition(".")[0], report.period)
        if scopes.setdefault(case, report.entity) != report.entity:
            lines.append(f"{report.path}: its scope {report.entity} differs from {scopes[case]}, which is used")
        elif report.incomplete:
            lines.append(f"{report.entity} {report.period}: figures are missing ({report.incomplete[0]})")
        else:
            reports[case] = report
    return reports, lines


def pair_letters(
    pairs: Mapping[Path, Path], letters: Mapping[Path, str], reports: Mapping[Case, Report]
) -> tuple[dict[Case, Path], list[str]]:
    """(case -> its letter, a line for each letter without a report), by pairs of a report file and its letter."""
    matched = {}
    for case, report in reports.items():
        paired = {pairs[path] for path in report.files if path in pairs}
        if len(paired) > 1:
            raise UserError(f"--pairs: the files of {' '.join(case)} have two letters; keep one.")
        if paired & letters.keys():
            matched[case] = paired.pop()
    return matched, [f"{path}: no report is paired with it" for path in letters if path not in matched.values()]


def find_letters(folder: Path) -> tuple[dict[Path, str], list[str]]:
    """(letter -> its text, a line for each other file). A letter is a non-empty UTF-8 .txt or .md file."""
    letters, lines = {}, []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        if is_clutter(path.relative_to(folder).as_posix()):
            continue
        try:
            text = path.read_bytes().decode("utf-8-sig").strip() if path.suffix.lower() in LETTER_SUFFIXES else None
        except UnicodeDecodeError as error:
            lines.append(f"{path}: not valid UTF-8 at byte {error.start}; save the file as UTF-8")
            continue
        if text:
            letters[path] = text.replace("\r\n", "\n")
        else:
            reason = "not a text file; save the letter as .txt in UTF-8" if text is None else "the letter is empty"
            lines.append(f"{path}: {reason}")
    return letters, lines


def match_letters(
    letters: Mapping[Path, str], cases: Iterable[Case], names: Mapping[str, str]
) -> tuple[dict[Case, Path], list[str]]:
    """(case -> its letter, a line for each letter without a match).

    Looks for the entity code, or the bank's name from `names`, and for the reference date: first in the file name of a
    letter, then in its first `HEAD_LINES` lines.
    """
    periods: dict[str, list[str]] = {}
    for entity, period in cases:
        periods.setdefault(entity, []).append(period)
    matched: dict[Case, Path] = {}
    lines = []
    for path, text in letters.items():
        head = "\n".join(text.splitlines()[:HEAD_LINES])
        entity = _find_entity(path.stem, periods, names) or _find_entity(head, periods, names)
        if entity is None:
            lines.append(f"{path}: mentions none of the banks that have reports")
            continue
        found = _find_periods(path.stem, periods[entity]) or _find_periods(head, periods[entity])
        if len(found) != 1:
            what = "several reference dates" if found else "no reference date"
            lines.append(f"{path}: mentions {what} for which {entity} filed a report")
        elif matched.setdefault((entity, found[0]), path) != path:
            lines.append(f"{path}: {matched[entity, found[0]]} is already the letter for the same report")
    return matched, lines


def read_pairs(path: Path, reports: Path, letters: Path) -> dict[Path, Path]:
    """Report file -> letter file, from a CSV with the columns `report` and `letter`.

    Paths in the CSV are relative to the folders `reports` and `letters`.
    """
    pairs = {}
    for where, row in read_table_of(path, ("report", "letter")):
        report, letter = reports / row["report"], letters / row["letter"]
        for listed in (report, letter):
            if not listed.exists():
                raise UserError(f"{where}: {listed} does not exist")
        if pairs.setdefault(report, letter) != letter:
            raise UserError(f"{where}: {report} is listed with a second letter")
    return pairs


def split_banks(banks: Sequence[str], shares: Sequence[float], seed: int) -> dict[str, str]:
    """Bank -> split, at random. `shares` are the fractions of the banks for train, validation and test.

    Raises `UserError` if they do not add up to 1, or if a split with a share above 0 would get no bank.
    """
    check_shares(shares)
    order = list(banks)
    random.Random(f"splits {seed}").shuffle(order)
    first, second = accumulate(round(len(order) * share) for share in shares[:2])
    parts = dict(zip(SPLITS, (order[:first], order[first:second], order[second:]), strict=True))
    check_counts(f"{len(order)} banks", map(len, parts.values()), shares)
    return {bank: split for split, members in parts.items() for bank in members}


def _make_examples(
    reports: Mapping[Case, Report],
    letters: Mapping[Case, Path],
    texts: Mapping[Path, str],
    register: Mapping[str, Addressee],
    findings: Mapping[Case, tuple[Finding, ...]],
) -> tuple[list[dict], list[str], list[str]]:
    """(an example for each report with a letter by bank and date, disagreements of the letters, findings without effect)."""
    cells = load_cells()
    examples, disagreements = [], []
    known = {(name, period) for code, period in letters for name in (code, reports[code, period].entity)}
    others = [(case, one) for case, stated in findings.items() if case not in known for one in stated]
    unused = [f"{one.where}: no report of {' '.join(case)} has a letter" for case, one in others]
    for case in sorted(letters):
        entity, period = case
        bank = register.get(entity, Addressee(entity, entity, "", ""))
        earlier = [report for (other, date), report in sorted(reports.items()) if other == entity and date < period]
        report = reports[case]
        stated = [one for name in dict.fromkeys((entity, report.entity)) for one in findings.get((name, period), ())]
        letter = texts[letters[case]]
        examples.append(make_example(report, bank, cells, FULL, earlier, letter, findings=stated))
        results = evaluate(report, FULL.rules)
        contradictions = find_disagreements(letter, results, apply_findings(results, stated))
        disagreements += [f"{entity} {period}: {letters[case]}: {one}" for one in contradictions]
        found = {result.rule_id for result in violations(results)}
        unused += [
            f"{finding.where}: {finding.rule} is lifted, but the rules do not find it in the report"
            for finding in stated
            if finding.state == "lifted" and finding.rule not in found
        ]
    return examples, disagreements, unused


def _find_entity(text: str, periods: Mapping[str, list[str]], names: Mapping[str, str]) -> str | None:
    """The only bank that a text mentions, by entity code or else by name (whole words; the longest name wins)."""
    coded = [entity for entity in periods if entity.lower() in text.lower()]
    if coded:
        return coded[0] if len(coded) == 1 else None
    words = " ".join(re.sub(r"[_\-]+", " ", text).lower().split())
    named = [entity for entity in periods if re.search(rf"\b{re.escape(names.get(entity, chr(0)).lower())}\b", words)]
    most = max((len(names[entity]) for entity in named), default=0)
    longest = [entity for entity in named if len(names[entity]) == most]
    return longest[0] if len(longest) == 1 else None


def _find_periods(text: str, known: Iterable[str]) -> list[str]:
    """The known reference dates that a text mentions.

    In any of these forms: 2026-03-31, 20260331, 31.03.2026, 31/3/2026, 31 March 2026, 31. März 2026, March 31, 2026, Q1 2026,
    2026-Q1.
    """
    found = []
    for period in known:
        day = datetime.date.fromisoformat(period)
        forms = [
            rf"{day:%Y}[-_. ]?{day:%m}[-_. ]?{day:%d}",
            rf"0?{day.day}[./-]0?{day.month}[./-]{day.year}",
            *(rf"0?{day.day}\.? {month} {day.year}" for month in (f"{day:%B}", GERMAN_MONTHS[day.month - 1])),
            rf"{day:%B} 0?{day.day},? {day.year}",
        ]
        if day.month % 3 == 0:
            forms += [rf"Q{day.month // 3}[-_ /]?{day.year}", rf"{day.year}[-_ /]?Q{day.month // 3}"]
        if re.search(rf"(?<![0-9])(?:{'|'.join(forms)})(?![0-9])", text, re.IGNORECASE):
            found.append(period)
    return found


def find_disagreements(letter: str, results: Sequence[RuleResult], violated: Sequence[RuleResult]) -> list[str]:
    """How a letter and the labels of its report contradict each other; empty if they do not, as far as can be seen.

    `results` are those of the engine, `violated` the labels, which findings.csv may have changed.
    """
    parts = sentences("\n".join(line for line in letter.splitlines() if not NO_OBJECTION.search(line)))
    objections = "\n".join(part for part in parts if NOT_MET.search(part) or not MET.search(part))
    demands, approves = DEMAND.search(objections), APPROVAL.search(letter)
    found = []
    if violated and approves and not demands:
        named = ", ".join(dict.fromkeys(result.rule_id for result in violated))
        found.append(f"the letter says {approves[0]!r} and demands nothing, but the labels have {named}")
    if not violated and demands and not approves:
        found.append(f"the letter demands something ({demands[0]!r}), but the labels have no violation")
    known = [result for result in results if result.state == "triggered"] + list(violated)
    return found + [*_only_in_letter(objections, known), *_only_in_labels(objections, violated)]


def _only_in_letter(objections: str, known: Sequence[RuleResult]) -> Iterator[str]:
    """Articles that the letter cites and no label has. `known`: violations and duties of the report."""
    legal = [one for result in known for one in articles(result.legal)]
    rules = [(rule.id, _citations(rule.legal)) for rule in (*built_in_rules(), *note_rules().values())]
    for act, number in sorted(articles(objections)):
        named = [name for name, own in rules if any(covers((act, number), one) for one in own)]
        if named and not any(covers((act, number), one) for one in legal):
            cited = f"{act} {number if number.startswith('Annex') else f'Art. {number}'}".strip()
            yield f"the letter cites {cited} ({', '.join(named[:3])}), but the labels have no violation of it"


def _only_in_labels(objections: str, violated: Sequence[RuleResult]) -> Iterator[str]:
    """Violations of which the letter has neither the cell, the id nor the percentage, nor the article.

    The article alone is enough only in a letter that names no cells: several rules share an article.
    """
    cited = [] if CELL.search(objections) else articles(objections)
    percentages = [one.replace(",", ".") for one in PERCENTAGE.findall(objections)]
    for result in violated:
        is_named = result.rule_id in objections or cell_name(result.cell, result.row) in objections
        is_cited = any(covers(one, other) for one in _citations(result.legal) for other in cited)
        is_stated = result.value is not None and any(
            abs(result.value * 100 - Decimal(one)) < 10 ** -len(one.partition(".")[2]) for one in percentages
        )
        if not (is_named or is_cited or is_stated):
            yield f"the labels have {write_violation(result)}, which the letter does not object to"


def covers(one: Article, other: Article) -> bool:
    """Whether both can mean the same: no difference in what both state. "Article 92" covers "CRR Article 92(1)(a)"."""
    same_act = one[0] == other[0] or not one[0] or not other[0]
    parts = (re.findall(r"Annex \w+|[0-9a-z]+", number) for _, number in (one, other))
    return same_act and all(first == second for first, second in zip(*parts, strict=False))


def _citations(legal: str) -> list[Article]:
    """The articles by which a letter can mean a rule."""
    return [(act, number) for act, number in articles(legal) if re.split(r"\W", number)[0] not in POWERS.get(act, ())]
