"""What a supervisor's letter states (figures, dates, articles) and demands (subjects with deadlines), and whether it is right."""

import functools
import pathlib
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal

from eval.rouge import mean
from xbrl.answers.answer_reader import Answer
from xbrl.answers.statements import statements

KINDS = ("figures", "dates", "articles")
# subject of a measure -> words by which a demand is recognised, in English and German
_SUBJECTS = {
    "capital": r"\bcapital\b(?! requirement| ratio)|recapitalis|own funds(?! templates| items)|tier 1|kapitalplan|eigenmittel\b",
    "distributions": r"distribut|capital conservation plan|dividends|kapitalerhaltungsplan|ausschütt",
    "leverage": r"leverage|balance sheet|raise tier 1|reduce exposure|verschuldungsquote",
    "liquidity": r"liquidity|liquid assets|\bbuffer\b|contingency funding|\bLCR\b|pledged|encumbered|liquiditäts|liquide aktiva",
    "funding": r"(?<!contingency )funding|\bNSFR\b|long-term lending|term deposits|refinanzierung",
    "exposure": r"\b(?:the|joint|this) exposure\b(?! amount)|\bexcess\b|\bclient|over the limit|risikoposition",
    "floor": r"output floor|floored|total risk exposure|standardised total|corrected report|untergrenze",
    "items": r"own funds items?|instrument|prudential filter|deduct|CET1 items|eligib",
    "misstatement": r"\bfil(?:e|ed|ing)\b|correct|resubmit|reichen|einzureichen",
    "filing": r"\bfil(?:e|ed|ing)\b|correct|resubmit|reichen|einzureichen",
    "timing": r"\blate\b|in time|remittance|verspätet",
}
_COUNTS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
    "einem zwei drei vier fünf sechs sieben acht neun zehn elf zwölf",
)
_NUMBERS = {word: number for words in _COUNTS for number, word in enumerate(words.split(), start=1)}
_NUMBERS |= {"a": 1, "an": 1, "twenty": 20, "thirty": 30, "forty": 40, "sixty": 60, "ninety": 90}
_NUMBERS |= {"eines": 1, "fünfzehn": 15, "zwanzig": 20, "dreißig": 30, "vierzig": 40, "sechzig": 60}
_TERM = re.compile(
    rf"\b(?:within|in|no later than|not later than|at the latest|before the end of|binnen|innerhalb von|spätestens in) "
    rf"(?P<number>\d+|{'|'.join(sorted(_NUMBERS, key=len, reverse=True))}) "
    r"(?P<kind>working |business |banking |calendar )?(?P<unit>day|week|month|arbeitstag|tag|woche|monat)(?:s|e|en|n)?\b",
    re.IGNORECASE,
)
_UNITS = {
    **{"day": {1}, "arbeitstag": {1}, "tag": {1}},
    **{"week": {7, 5}, "woche": {7, 5}, "month": {30, 20}, "monat": {30, 20}},
}
_RIGHTS = re.compile(
    r"\bobject|\bappeal|\bbe heard\b|\bcomment|\bremedy|widersp|anhör|stellung nehmen|klage"
    r"|resolution of (?:your|the) owners|beschluss ihrer eigentümer",  # not the bank's own term
    re.IGNORECASE,
)
TAKE_BACK = ("negation", "weakening", "deferral")  # classes of `flagged_words` that take a demand back
_BLOCKS = pathlib.Path(__file__).parents[1] / "desk" / "blocks"
_ALL = re.compile(  # words for what a letter demands as a whole
    r"\b(?:measures|orders|demands|directive|obligations|they)\b|\bthis (?:letter|decision|order|notice)\b"
    r"|\bthe (?:above|foregoing|following)\b(?! \w)|\bthe following (?:applies|is)\b|\bthe above (?:is|are|does|do|need|may)\b"
    r"|\b(?:of|do|ignore|disregard) (?:this|these|that|it|the above)\b|\bthese\b(?= (?:are|do|have|need|may|apply)\b)"
    r"|\b(?:need not|not have to|not (?:required|obliged) to|no need to) (?:do so|comply|carry (?:it|them|this) out)\b"
    r"|\bcompliance\b|\b(?:deadlines?|everything|all) above\b|\bno (?:measure|action)s? (?:is|are) (?:required|needed|necessary)\b"
    r"|maßnahmen|anordnungen|\bdiese[sr]? (?:schreiben|brief|bescheid)|\bdas (?:vorstehende|folgende|obige)\b|\bdavon\b"
    r"|\bdem nicht nachzukommen\b|\bdas nicht zu tun\b",
    re.IGNORECASE,
)
# "If the measures are not taken in time, ..." takes nothing back.
_IF = re.compile(r"^(?:[-*•] |\d+\. )?(?:\w+: )?(?:If|Unless|Should|Wenn|Falls|Sollten?|Werden)\b[^,]*,")
_ORDERING = (  # what a plain heading of measures is
    r"(?:the )?(?:measures|orders|directive)|we (?:hereby |therefore )?(?:order|direct|require)(?: you)?(?: as follows| to)?"
    r"|maßnahmen|anordnungen|wir ordnen(?: daher| hiermit)?(?: folgendes)? an"
)


def score_letters(examples: Sequence[dict], true: Sequence[Answer], letters: Sequence[str]) -> dict:
    """The share of the statements of the `letters` that are supported: in all and by kind, with their numbers `n`.

    Supported are the statements of the report and of the reference letter, and the values, limits, shortfalls and articles of
    the true findings. None where the letters state nothing.
    """
    stated, found = Counter(), Counter()
    for example, truth, letter in zip(examples, true, letters, strict=True):
        support = supported(example, truth)
        for kind, said in statements(letter).items():
            stated[kind] += len(said)
            found[kind] += len(said & support[kind])
    total = sum(stated.values())
    by_kind = {k: {"supported": found[k] / stated[k] if stated[k] else None, "n": stated[k]} for k in KINDS}
    return {"supported": sum(found.values()) / total if total else None, "n": total, "by_kind": by_kind}


def supported(example: dict, truth: Answer) -> dict[str, set]:
    """All statements that a letter on this example may make, as `statements`."""
    texts = [message["content"] or "" for message in example["messages"][:-1]]
    known = statements("\n".join([*texts, truth.directive]))
    for claim in truth.claims:
        numbers = {value for value in (claim.value, claim.limit) if isinstance(value, Decimal)}
        known["figures"] |= numbers | ({max(numbers) - min(numbers)} if len(numbers) == 2 else set())
        known["articles"] |= claim.legal
    return known


def deadlines(text: str) -> list[frozenset[int]]:
    """The terms that a text sets, each as the numbers of days that it may stand for.

    `within ten working days` is 10, `within 30 days` is 30. Two weeks are 14 days or 10 working days, a month is 30 days or 20
    working days.
    """
    found = []
    for match in _TERM.finditer(text):
        number = match["number"].casefold()
        count = int(number) if number.isdigit() else _NUMBERS[number]
        found.append(frozenset(count * one for one in _UNITS[match["unit"].casefold()]))
    return found


def taken_back(sentence: str) -> str:
    """The first word of a sentence that negates, weakens or defers what it demands; "" if there is none.

    Of a sentence from the approved blocks only what is filled in counts: the blocks use such words rightly.
    """
    match = _take_back().search(sentence)
    if not match:
        return ""
    plain = re.sub(rf"^(?:[-*•] |\d+\. )?(?:(?:{'|'.join(_headings())}): )?", "", sentence.strip()).rstrip(".")
    for block in _approved():
        if filled := block.fullmatch(plain):
            return next((found[0] for text in filled.groups() if (found := _take_back().search(text))), "")
    return match[0]


@functools.cache
def _headings() -> tuple[str, ...]:
    """The headings of the approved letters, as patterns: `Measures`, `Legal basis`."""
    layouts = "\n".join(path.read_text(encoding="utf-8") for path in sorted(_BLOCKS.glob("*/letter.jinja")))
    return tuple(map(re.escape, re.findall(r"^(\w[\w ]*):(?=$| )", layouts, re.MULTILINE)))


@functools.cache
def _approved() -> tuple[re.Pattern, ...]:
    """The sentences of the approved blocks of all languages; a group stands for each text that is filled in.

    That no measure is required stands in no letter that has measures, so there it takes them back.
    """
    blocks: list[str] = []
    for path in sorted(_BLOCKS.glob("*/[!f]*.toml")) + sorted(_BLOCKS.glob("*/findings.toml")):
        for section in tomllib.loads(path.read_text(encoding="utf-8")).values():
            blocks += [text for name, text in section.items() if isinstance(text, str) and name != "no_measure"]
    parts = (re.split(r"\{%.*?%\}|(?<=[a-zäöüß)}])\. (?=[A-ZÄÖÜ])", block) for block in blocks)
    sentences = {part.strip().rstrip(".") for found in parts for part in found}
    fixed = [re.split(r"\{\{.*?\}\}", one) for one in sorted(sentences)]
    texts = ("(.+?)".join(map(re.escape, one)) for one in fixed if len(" ".join(one).split()) > 3)  # not of a date
    return tuple(re.compile(text, re.IGNORECASE) for text in texts)


@functools.cache
def flagged_words() -> dict[str, list[str]]:
    """Class -> words that may turn a finding or a demand round, of all languages: `blocks/LANGUAGE/flags.toml`."""
    found: dict[str, list[str]] = {}
    for path in sorted(_BLOCKS.glob("*/flags.toml")):
        for name, words in tomllib.loads(path.read_text(encoding="utf-8"))["flags"].items():
            found.setdefault(name.replace("_", " "), []).extend(words)
    return found


@functools.cache
def _take_back() -> re.Pattern:
    words = sorted((word for name in TAKE_BACK for word in flagged_words()[name]), key=len, reverse=True)
    ahead = r"(?!\w)(?! (?:later|less|fewer|more|exceeding|undue|delay|später|verzug)\b)"  # "no later than", "without delay"
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))}){ahead}", re.IGNORECASE)


def demands(letter: str) -> Iterator[tuple[frozenset[str], frozenset[int]]]:
    """Yield (subjects, days) of each sentence of a letter that sets one term, names a subject, and is not taken back.

    A sentence is taken back by its own words (`taken_back`), by a heading above it that is neither one of the approved letters
    nor plain ("We order:"), or with all others by a sentence on all of them ("None of this is required.").
    """
    found, void = [], False
    for line in letter.split("\n"):
        plain = line.strip().strip("*#_ ")
        if plain.endswith(":"):
            void = not re.fullmatch(rf"{'|'.join(_headings())}|{_ORDERING}", plain.removesuffix(":"), re.IGNORECASE)
            continue
        for sentence in re.split(r"(?<=[a-zäöüß)])\. (?=[A-ZÄÖÜ])", line):
            if _RIGHTS.search(sentence):
                continue
            terms = deadlines(sentence)
            subjects = frozenset(name for name, words in _SUBJECTS.items() if re.search(words, sentence, re.IGNORECASE))
            if not terms and _ALL.search(rest := _IF.sub("", sentence)) and taken_back(rest) and taken_back(sentence):
                return
            if terms and subjects and not void and not taken_back(sentence):
                found.append((subjects, frozenset().union(*terms)))
    yield from found


def score_measures(examples: Sequence[dict], letters: Sequence[str]) -> dict | None:
    """The share of the required measures that a letter demands in time; None if no example has the field `measures`.

    A measure `{"subject", "deadline_days"}` is right if a sentence that is not taken back (`demands`) names its subject and
    sets its deadline, and no sentence on this subject alone sets another one. `reports` is the share of the letters that are
    right as a whole: every measure, and on a report that requires none, no demand with a deadline. An empty letter (that of an
    unparsable answer) is wrong. `n` counts measures, `n_reports` letters.
    """
    pairs = [(one["measures"], letter) for one, letter in zip(examples, letters, strict=True) if "measures" in one]
    if not pairs:
        return None
    right, whole = [], []
    for required, letter in pairs:
        said = list(demands(letter))
        of_letter = [_is_demanded(measure, said) for measure in required]
        right += of_letter
        whole.append(all(of_letter) if required else letter.strip() != "" and not said)
    n = len(right)
    return {"right": sum(right) / n if n else None, "n": n, "reports": mean(whole), "n_reports": len(pairs)}


def _is_demanded(measure: dict, said: Sequence[tuple[frozenset[str], frozenset[int]]]) -> bool:
    subject, days = measure["subject"], measure["deadline_days"]
    about = [(subjects, terms) for subjects, terms in said if subject in subjects]
    contradicted = any(subjects == {subject} and days not in terms for subjects, terms in about)
    return any(days in terms for _, terms in about) and not contradicted
