"""Make training examples from a supervisor's archive: report files, and the directive letters that answered them.

A letter belongs to the reports of one bank for one reference date. The letter names both in its file name or first lines, or a
CSV file of pairs assigns it. Letters and reports without a counterpart are listed with the reason. A report with missing
figures is left out, because the rules would mislabel it.

Letters are compared with the violations of their reports, to find wrong pairs, missing findings and waivers. The comparison
relies on what can be checked: articles, cells, ids of rules, figures. It does not understand the letter. Words such as "no
objection" count only in a letter that demands nothing, and a sentence counts as an objection unless it says in the words of
`MET` that a requirement is met. Citations and words are recognised in English and German.
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
from xbrl.answers.profiles import FULL
from xbrl.answers.statements import articles, sentences
from xbrl.corpus.card import SPLITS, check_counts, check_shares, group_by_split, write_splits
from xbrl.corpus.examples import make_example
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import Report
from xbrl.read.folder import join_modules, read_files, report_files
from xbrl.read.register import read_register
from xbrl.read.render import Addressee, cell_name
from xbrl.read.replies import add_replies
from xbrl.read.safety import is_clutter
from xbrl.read.xbrl_csv import read_table_of
from xbrl.rules.findings import Finding, apply_findings, load_findings, note_rules
from xbrl.rules.rules import RuleResult, built_in_rules, evaluate, violations

LETTER_SUFFIXES = (".txt", ".md")
HEAD_LINES = 12  # lines of a letter that are searched when its file name does not identify the report
GERMAN_MONTHS = (
    "Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September", "Oktober", "November", "Dezember",
)  # fmt: skip
ReportKey = tuple[str, str]  # (entity without its scope suffix, reference date YYYY-MM-DD)
Article = tuple[str, str]  # (act, number), as returned by `statements.articles`
HOW_MADE = (
    "xbrl/scripts/regulator.py examples: report files of an archive, paired with their letters, labelled by xbrl/rules/rules.jsonl "
    "and by findings.csv."
)
LIMITS = (
    "Made from a supervisor's own archive. The violations are those that xbrl/rules/rules.jsonl finds in the reported "
    "figures, corrected by findings.csv if one was given, not those that the letters name: disagreements.txt lists where "
    "the two contradict each other, as far as articles, cells and figures show it."
)

# Articles on powers, sanctions and duties to report: a letter cites them whether or not a rule is violated.
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
# A line about requirements that are met, or that the figures cannot decide.
NO_OBJECTION = re.compile(r"\bsmallest margin\b|\bkleinste Abstand\b|^Not tested\b|^Nicht geprüft\b", re.IGNORECASE)
NOT_MET = re.compile(r"\b(not|nor|never|fail(s|ed)?|misse[sd]|below|until|nicht|unter)\b", re.IGNORECASE)
# Percentages, but not differences in percentage points.
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

    `places` has the directories `reports` and `letters`, and the files `pairs` (a CSV with the columns report,letter),
    `register` (entity,name,country,type) and `findings` (findings.csv, annotated by a supervisor), each of which may be None.
    `record` has the arguments for the data card. Print the number of examples of each split, and on stderr the files left out and
    the letters that disagree. Raise `UserError` if a directory is missing, or if no report has a letter.
    """
    folder, letter_folder = (Path(places[name] or "") for name in ("reports", "letters"))
    for option, directory in (("--reports", folder), ("--letters", letter_folder)):
        if not directory.is_dir():
            raise UserError(f"{option} {directory}: no such directory.")
    register = read_register(places["register"]) if places["register"] else {}
    findings = load_findings(places["findings"]) if places["findings"] else {}
    reports, unread = read_reports(folder, processes)
    texts, without_report = find_letters(letter_folder)
    if places["pairs"]:
        letters, unpaired = pair_letters(read_pairs(places["pairs"], folder, letter_folder), texts, reports)
    else:
        letters, unpaired = match_letters(texts, reports, {entity: bank.name for entity, bank in register.items()})
    without_report += unpaired
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


def read_reports(folder: Path, processes: int) -> tuple[dict[ReportKey, Report], list[str]]:
    """Read the reports below `folder`. Return (key -> merged report, a line for each file or report that cannot be used).

    Raise `UserError` if the folder has no report file.
    """
    files, without_report = report_files(folder)
    lines = [f"{path}: no report of this folder by its name" for path in without_report]
    read, refused = read_files(files, processes)
    lines += refused.values()
    reports: dict[ReportKey, Report] = {}
    scopes: dict[ReportKey, str] = {}
    with_replies, strangers = add_replies(join_modules(read, refused), files, reads_texts=False)
    lines += strangers
    for report in with_replies:
        key = (report.entity.partition(".")[0], report.period)
        if scopes.setdefault(key, report.entity) != report.entity:
            lines.append(f"{report.path}: its scope {report.entity} differs from {scopes[key]}, which is used")
        elif report.incomplete:
            lines.append(f"{report.entity} {report.period}: figures are missing ({report.incomplete[0]})")
        else:
            reports[key] = report
    return reports, lines


def pair_letters(
    pairs: Mapping[Path, Path], letters: Mapping[Path, str], reports: Mapping[ReportKey, Report]
) -> tuple[dict[ReportKey, Path], list[str]]:
    """Match letters to reports by `pairs` (report file -> letter). Return (key -> letter, a line for each unpaired letter)."""
    matched = {}
    for key, report in reports.items():
        paired = {pairs[path] for path in report.files if path in pairs}
        if len(paired) > 1:
            raise UserError(f"--pairs: the files of {' '.join(key)} have two letters; keep one.")
        if paired & letters.keys():
            matched[key] = paired.pop()
    return matched, [f"{path}: no report is paired with it" for path in letters if path not in matched.values()]


def find_letters(folder: Path) -> tuple[dict[Path, str], list[str]]:
    """Read the letters below `folder`: non-empty UTF-8 .txt or .md files. Return (path -> text, a line for each other file)."""
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
    letters: Mapping[Path, str], keys: Iterable[ReportKey], names: Mapping[str, str]
) -> tuple[dict[ReportKey, Path], list[str]]:
    """Match letters to reports by their text. Return (key of the report -> letter, a line for each letter without a match).

    Look for the entity code, or the bank's name from `names`, and for the reference date: first in the file name of a letter,
    then in its first `HEAD_LINES` lines.
    """
    periods: dict[str, list[str]] = {}
    for entity, period in keys:
        periods.setdefault(entity, []).append(period)
    matched: dict[ReportKey, Path] = {}
    lines = []
    for path, text in letters.items():
        head = "\n".join(text.splitlines()[:HEAD_LINES])
        entity = _find_entity(path.stem, periods, names) or _find_entity(head, periods, names)
        if entity is None:
            lines.append(f"{path}: mentions none of the banks that have reports")
            continue
        dates = _find_periods(path.stem, periods[entity]) or _find_periods(head, periods[entity])
        if len(dates) != 1:
            mentioned = "several reference dates" if dates else "no reference date"
            lines.append(f"{path}: mentions {mentioned} for which {entity} filed a report")
        elif matched.setdefault((entity, dates[0]), path) != path:
            lines.append(f"{path}: {matched[entity, dates[0]]} is already the letter for the same report")
    return matched, lines


def read_pairs(path: Path, reports: Path, letters: Path) -> dict[Path, Path]:
    """Read report file -> letter file from a CSV with the columns `report` and `letter`.

    Paths in the CSV are relative to the folders `reports` and `letters`. Raise `UserError`, which names the line, if a file does
    not exist or a report has two letters.
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
    """Assign each bank to a split at random. `shares` has the fractions of the banks for train, validation and test.

    Raise `UserError` if they do not add up to 1, or if a split with a share above 0 would get no bank.
    """
    check_shares(shares)
    order = list(banks)
    random.Random(f"splits {seed}").shuffle(order)
    first, second = accumulate(round(len(order) * share) for share in shares[:2])
    parts = dict(zip(SPLITS, (order[:first], order[first:second], order[second:]), strict=True))
    check_counts(f"{len(order)} banks", map(len, parts.values()), shares)
    return {bank: split for split, members in parts.items() for bank in members}


def _make_examples(
    reports: Mapping[ReportKey, Report],
    letters: Mapping[ReportKey, Path],
    texts: Mapping[Path, str],
    register: Mapping[str, Addressee],
    findings: Mapping[ReportKey, tuple[Finding, ...]],
) -> tuple[list[dict], list[str], list[str]]:
    """Return (examples ordered by bank and date, lines on letters that disagree, lines on findings without effect)."""
    cells = load_cells()
    examples, disagreements = [], []
    known = {(name, period) for code, period in letters for name in (code, reports[code, period].entity)}
    unused = [
        f"{finding.where}: no report of {' '.join(key)} has a letter"
        for key, lines in findings.items()
        if key not in known
        for finding in lines
    ]
    for key in sorted(letters):
        entity, period = key
        bank = register.get(entity, Addressee(entity, entity, "", ""))
        earlier = [old for (bank_code, date), old in sorted(reports.items()) if bank_code == entity and date < period]
        report = reports[key]
        names = dict.fromkeys((entity, report.entity))
        stated = [finding for name in names for finding in findings.get((name, period), ())]
        letter = texts[letters[key]]
        examples.append(make_example(report, bank, cells, FULL, earlier, letter, findings=stated))
        results = evaluate(report, FULL.rules)
        contradictions = find_disagreements(letter, results, apply_findings(results, stated))
        disagreements += [f"{entity} {period}: {letters[key]}: {line}" for line in contradictions]
        violated = {result.rule_id for result in violations(results)}
        unused += [
            f"{finding.where}: {finding.rule} is lifted, but the rules do not find it in the report"
            for finding in stated
            if finding.state == "lifted" and finding.rule not in violated
        ]
    return examples, disagreements, unused


def _find_entity(text: str, periods: Mapping[str, list[str]], names: Mapping[str, str]) -> str | None:
    """Return the bank that a text mentions, by entity code or else by name; None if it mentions none or several.

    Names are compared as whole words. If several banks are named, the longest name counts.
    """
    coded = [entity for entity in periods if entity.lower() in text.lower()]
    if coded:
        return coded[0] if len(coded) == 1 else None
    words = " ".join(re.sub(r"[_\-]+", " ", text).lower().split())
    named = [entity for entity in periods if re.search(rf"\b{re.escape(names.get(entity, chr(0)).lower())}\b", words)]
    most = max((len(names[entity]) for entity in named), default=0)
    longest = [entity for entity in named if len(names[entity]) == most]
    return longest[0] if len(longest) == 1 else None


def _find_periods(text: str, known: Iterable[str]) -> list[str]:
    """Return the known reference dates that a text mentions.

    A date may have any of these forms: 2026-03-31, 20260331, 31.03.2026, 31/3/2026, 31 March 2026, 31. März 2026, March 31, 2026,
    Q1 2026, 2026-Q1.
    """
    mentioned = []
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
            mentioned.append(period)
    return mentioned


def find_disagreements(letter: str, results: Sequence[RuleResult], violated: Sequence[RuleResult]) -> list[str]:
    """Return a line for each way in which a letter contradicts the labels of its report, as far as can be checked.

    `results` has the engine's results. `violated` has the labels: the violations after corrections by findings.csv.
    """
    parts = sentences("\n".join(line for line in letter.splitlines() if not NO_OBJECTION.search(line)))
    objections = "\n".join(part for part in parts if NOT_MET.search(part) or not MET.search(part))
    demands, approves = DEMAND.search(objections), APPROVAL.search(letter)
    lines = []
    if violated and approves and not demands:
        named = ", ".join(dict.fromkeys(result.rule_id for result in violated))
        lines.append(f"the letter says {approves[0]!r} and demands nothing, but the labels have {named}")
    if not violated and demands and not approves:
        lines.append(f"the letter demands something ({demands[0]!r}), but the labels have no violation")
    known = [result for result in results if result.state == "triggered"] + list(violated)
    return lines + [*_only_in_letter(objections, known), *_only_in_labels(objections, violated)]


def _only_in_letter(objections: str, known: Sequence[RuleResult]) -> Iterator[str]:
    """Yield a line for each article that the letter cites and no label has. `known` has the report's violations and duties."""
    known_articles = [article for result in known for article in articles(result.legal)]
    rules = [(rule.id, _citations(rule.legal)) for rule in (*built_in_rules(), *note_rules().values())]
    for act, number in sorted(articles(objections)):
        named = [name for name, legal in rules if any(may_agree((act, number), article) for article in legal)]
        if named and not any(may_agree((act, number), article) for article in known_articles):
            cited = f"{act} {number if number.startswith('Annex') else f'Art. {number}'}".strip()
            yield f"the letter cites {cited} ({', '.join(named[:3])}), but the labels have no violation of it"


def _only_in_labels(objections: str, violated: Sequence[RuleResult]) -> Iterator[str]:
    """Yield a line for each violation that the letter names neither by cell, rule id or percentage nor by article.

    The article counts only in a letter that names no cells, because several rules share an article.
    """
    cited = [] if CELL.search(objections) else articles(objections)
    percentages = [number.replace(",", ".") for number in PERCENTAGE.findall(objections)]
    for result in violated:
        is_named = result.rule_id in objections or cell_name(result.cell, result.row) in objections
        is_cited = any(may_agree(own, article) for own in _citations(result.legal) for article in cited)
        is_stated = result.value is not None and any(
            abs(result.value * 100 - Decimal(number)) < 10 ** -len(number.partition(".")[2]) for number in percentages
        )
        if not (is_named or is_cited or is_stated):
            yield f"the labels have {write_violation(result)}, which the letter does not object to"


def may_agree(first: Article, second: Article) -> bool:
    """Return whether two citations may mean the same provision. "Article 92" may mean "CRR Article 92(1)(a)"."""
    same_act = first[0] == second[0] or not first[0] or not second[0]
    parts = (re.findall(r"Annex \w+|[0-9a-z]+", number) for _, number in (first, second))
    return same_act and all(left == right for left, right in zip(*parts, strict=False))


def _citations(legal: str) -> list[Article]:
    """Return the articles by which a letter may cite a rule: all of its articles but those in `POWERS`."""
    return [(act, number) for act, number in articles(legal) if re.split(r"\W", number)[0] not in POWERS.get(act, ())]
