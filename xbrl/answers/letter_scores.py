"""Score a supervisor's letter: its statements (figures, dates, articles) and its demands (subjects with deadlines)."""

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
# Subject of a measure -> a pattern of words that name it in a demand, in English and German.
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
    r"|resolution of (?:your|the) owners|beschluss ihrer eigentümer",  # a deadline that is not the bank's
    re.IGNORECASE,
)
TAKE_BACK = ("negation", "weakening", "deferral")  # classes of `flagged_words` that withdraw a demand
_BLOCKS = pathlib.Path(__file__).parents[1] / "desk" / "blocks"
_ALL = re.compile(  # words for all demands of a letter together
    r"\b(?:measures|orders|demands|directive|obligations|they)\b|\bthis (?:letter|decision|order|notice)\b"
    r"|\bthe (?:above|foregoing|following)\b(?! \w)|\bthe following (?:applies|is)\b|\bthe above (?:is|are|does|do|need|may)\b"
    r"|\b(?:of|do|ignore|disregard) (?:this|these|that|it|the above)\b|\bthese\b(?= (?:are|do|have|need|may|apply)\b)"
    r"|\b(?:need not|not have to|not (?:required|obliged) to|no need to) (?:do so|comply|carry (?:it|them|this) out)\b"
    r"|\bcompliance\b|\b(?:deadlines?|everything|all) above\b|\bno (?:measure|action)s? (?:is|are) (?:required|needed|necessary)\b"
    r"|maßnahmen|anordnungen|\bdiese[sr]? (?:schreiben|brief|bescheid)|\bdas (?:vorstehende|folgende|obige)\b|\bdavon\b"
    r"|\bdem nicht nachzukommen\b|\bdas nicht zu tun\b",
    re.IGNORECASE,
)
# "If the measures are not taken in time, ..." withdraws nothing.
_IF = re.compile(r"^(?:[-*•] |\d+\. )?(?:\w+: )?(?:If|Unless|Should|Wenn|Falls|Sollten?|Werden)\b[^,]*,")
_ORDERING = (  # a plain heading of measures
    r"(?:the )?(?:measures|orders|directive)|we (?:hereby |therefore )?(?:order|direct|require)(?: you)?(?: as follows| to)?"
    r"|maßnahmen|anordnungen|wir ordnen(?: daher| hiermit)?(?: folgendes)? an"
)


def score_letters(examples: Sequence[dict], true: Sequence[Answer], letters: Sequence[str]) -> dict:
    """Return the fraction of the letters' statements that are supported, in all and by kind, with their numbers `n`.

    Statements of the report and of the reference letter are supported, and so are the values, limits, shortfalls and articles
    of the true findings. The fraction is None if the letters state nothing.
    """
    stated, supported = Counter(), Counter()
    for example, truth, letter in zip(examples, true, letters, strict=True):
        support = supporting(example, truth)
        for kind, of_letter in statements(letter).items():
            stated[kind] += len(of_letter)
            supported[kind] += len(of_letter & support[kind])
    total = sum(stated.values())
    by_kind = {k: {"supported": supported[k] / stated[k] if stated[k] else None, "n": stated[k]} for k in KINDS}
    return {"supported": sum(supported.values()) / total if total else None, "n": total, "by_kind": by_kind}


def supporting(example: dict, truth: Answer) -> dict[str, set]:
    """Return all statements that a letter on this example may make, in the form of `statements`."""
    texts = [message["content"] or "" for message in example["messages"][:-1]]
    known = statements("\n".join([*texts, truth.directive]))
    for claim in truth.claims:
        numbers = {value for value in (claim.value, claim.limit) if isinstance(value, Decimal)}
        known["figures"] |= numbers | ({max(numbers) - min(numbers)} if len(numbers) == 2 else set())
        known["articles"] |= claim.legal
    return known


def deadlines(text: str) -> list[frozenset[int]]:
    """Return the deadlines of a text, each as the set of numbers of days that it may mean.

    `within ten working days` is 10, `within 30 days` is 30. Two weeks are 14 days or 10 working days, a month is 30 days or 20
    working days.
    """
    terms = []
    for match in _TERM.finditer(text):
        number = match["number"].casefold()
        count = int(number) if number.isdigit() else _NUMBERS[number]
        terms.append(frozenset(count * days for days in _UNITS[match["unit"].casefold()]))
    return terms


def taken_back(sentence: str) -> str:
    """Return the first word of a sentence that negates, weakens or defers its demand; "" if there is none.

    In a sentence from the approved blocks only the filled-in texts are searched, because the blocks use such words rightly.
    """
    match = _take_back().search(sentence)
    if not match:
        return ""
    plain = re.sub(rf"^(?:[-*•] |\d+\. )?(?:(?:{'|'.join(_headings())}): )?", "", sentence.strip()).rstrip(".")
    for block in _approved():
        if filled := block.fullmatch(plain):
            return next((word[0] for text in filled.groups() if (word := _take_back().search(text))), "")
    return match[0]


@functools.cache
def _headings() -> tuple[str, ...]:
    """Return the headings of the approved letters, as patterns: `Measures`, `Legal basis`."""
    layouts = "\n".join(path.read_text(encoding="utf-8") for path in sorted(_BLOCKS.glob("*/letter.jinja")))
    return tuple(map(re.escape, re.findall(r"^(\w[\w ]*):(?=$| )", layouts, re.MULTILINE)))


@functools.cache
def _approved() -> tuple[re.Pattern, ...]:
    """Return the sentences of the approved blocks of all languages, as patterns with a group for each filled-in text.

    The sentence `no_measure` is left out: a letter that demands measures and says that none is required withdraws them.
    """
    blocks: list[str] = []
    for path in sorted(_BLOCKS.glob("*/[!f]*.toml")) + sorted(_BLOCKS.glob("*/findings.toml")):
        for section in tomllib.loads(path.read_text(encoding="utf-8")).values():
            blocks += [text for name, text in section.items() if isinstance(text, str) and name != "no_measure"]
    parts = (re.split(r"\{%.*?%\}|(?<=[a-zäöüß)}])\. (?=[A-ZÄÖÜ])", block) for block in blocks)
    sentences = {part.strip().rstrip(".") for parts_of_block in parts for part in parts_of_block}
    fixed = [re.split(r"\{\{.*?\}\}", sentence) for sentence in sorted(sentences)]
    # A sentence of three words or fewer, such as a date, would match anything.
    texts = ("(.+?)".join(map(re.escape, pieces)) for pieces in fixed if len(" ".join(pieces).split()) > 3)
    return tuple(re.compile(text, re.IGNORECASE) for text in texts)


@functools.cache
def flagged_words() -> dict[str, list[str]]:
    """Return class -> words that may reverse a finding or a demand, of all languages, from `blocks/LANGUAGE/flags.toml`."""
    words_by_class: dict[str, list[str]] = {}
    for path in sorted(_BLOCKS.glob("*/flags.toml")):
        for name, words in tomllib.loads(path.read_text(encoding="utf-8"))["flags"].items():
            words_by_class.setdefault(name.replace("_", " "), []).extend(words)
    return words_by_class


@functools.cache
def _take_back() -> re.Pattern:
    words = sorted((word for name in TAKE_BACK for word in flagged_words()[name]), key=len, reverse=True)
    ahead = r"(?!\w)(?! (?:later|less|fewer|more|exceeding|undue|delay|später|verzug)\b)"  # "no later than", "without delay"
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))}){ahead}", re.IGNORECASE)


def demands(letter: str) -> Iterator[tuple[frozenset[str], frozenset[int]]]:
    """Yield (subjects, days) of each sentence of a letter that sets a deadline, names a subject, and is not withdrawn.

    A sentence is withdrawn by its own words (`taken_back`), by a heading above it that is neither an approved heading nor plain
    ("We order:"), or by a sentence about all demands ("None of this is required."), which withdraws the whole letter.
    """
    demanded, void = [], False
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
                demanded.append((subjects, frozenset().union(*terms)))
    yield from demanded


def score_measures(examples: Sequence[dict], letters: Sequence[str]) -> dict | None:
    """Return the fraction of the required measures that the letters demand in time; None if no example has the field `measures`.

    A measure `{"subject", "deadline_days"}` is right if a sentence that is not withdrawn (`demands`) names its subject and
    sets its deadline, and no sentence on this subject alone sets another deadline. `reports` is the fraction of letters in which
    every measure is right, and which demand nothing with a deadline if none is required. The empty letter of an unparsable
    answer is wrong. `n` counts measures, `n_reports` letters.
    """
    pairs = [
        (example["measures"], letter)
        for example, letter in zip(examples, letters, strict=True)
        if "measures" in example
    ]
    if not pairs:
        return None
    right, whole = [], []
    for required, letter in pairs:
        demanded = list(demands(letter))
        of_letter = [_is_demanded(measure, demanded) for measure in required]
        right += of_letter
        whole.append(all(of_letter) if required else letter.strip() != "" and not demanded)
    n = len(right)
    return {"right": sum(right) / n if n else None, "n": n, "reports": mean(whole), "n_reports": len(pairs)}


def _is_demanded(measure: dict, demanded: Sequence[tuple[frozenset[str], frozenset[int]]]) -> bool:
    subject, days = measure["subject"], measure["deadline_days"]
    about = [(subjects, terms) for subjects, terms in demanded if subject in subjects]
    contradicted = any(subjects == {subject} and days not in terms for subjects, terms in about)
    return any(days in terms for _, terms in about) and not contradicted
