"""The strongest programs without a language model: figures by regular expressions, limits by the engine, notes by a regression.

A logistic regression on the words of a note, or on a frozen model's mean hidden state of the note, predicts which kinds of facts
the note states and whether they apply; amounts are parsed from the note. The rules that follow are computed
(`rules.note_facts.consequences`) from the printed figures.
"""

import itertools
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from eval.asked_examples import report_of
from xbrl.answers.note_scores import language_of, note_of, true_facts
from xbrl.answers.statements import parse_quantity
from xbrl.read.filed_report import CellKey, Fact, Report
from xbrl.read.render import SHORT_LABELS
from xbrl.rules.note_facts import BUFFER, KINDS, NAME, SHARE, NoteFact, consequences

Matrix = Any  # a scipy.sparse.csr_matrix or an array, (texts, features)
States = Mapping[str, np.ndarray]  # text -> `hidden_states`
# (training texts, new texts) -> their features
Features = Callable[[Sequence[str], Sequence[str]], tuple[Matrix, Matrix]]
FOLDS = 4
_WORD = {"token_pattern": r"(?u)\b\w+\b"}
TEXT_OPTIONS = (  # words; words, pairs of words, and pieces of words of 2 to 5 characters
    [_WORD],
    [_WORD | {"ngram_range": (1, 2)}, {"analyzer": "char_wb", "ngram_range": (2, 5)}],
)
WORD_STRENGTHS = (1.0, 10.0, 100.0)  # candidates for C, the inverse of the regularization
STATE_STRENGTHS = (0.001, 0.01, 0.1, 1.0)
PERCENTAGE = "xbrli:pure"  # the unit of a ratio
DATE = "2000-01-01"  # the date of a report of which only the figures matter
_TABLE = re.compile(r"([A-Z]) (\d\d\.\d\d(?:\.[a-z])?)(?= |$)")
_CELL = re.compile(r"(?:(r\d+) )?(c\d+)(?: .*)? \| (.*)")
_LABELS = {label: cell for cell, label in SHORT_LABELS.items()}
_SHORT = re.compile(
    rf"({'|'.join(sorted(map(re.escape, _LABELS), key=len, reverse=True))}) (?:(.+) )?(-?[\d,]+(?:\.\d+)?(?:%| (?:k|mn|bn))?)"
)
_NUMBER = r"\d{1,3}(?:[.,'\u202f]\d{3})+(?:[.,]\d+)?|\d+(?:[.,]\d+)?"
_SCALES = {
    **dict.fromkeys(("thousand", "tsd", "tausend"), 3),
    **dict.fromkeys(("m", "mn", "million", "millions", "mio", "millionen"), 6),
    **dict.fromkeys(("bn", "billion", "mrd", "milliarden", "milliarde"), 9),
}
_AMOUNT = re.compile(
    rf"(?P<currency>EUR|€)? ?(?P<number>{_NUMBER})(?:[ -]?(?P<scale>{'|'.join(sorted(_SCALES, key=len, reverse=True))})\b\.?)?"
    r"(?P<after> (?:EUR|Euro|euros?)\b| ?€)?",
    re.IGNORECASE,
)


def note_predictions(
    training: Sequence[dict], test: Sequence[dict], validation: Sequence[dict] = (), states: States | None = None
) -> tuple[list[tuple[str, ...]], list[tuple[NoteFact, ...]]]:
    """Return (the rules, the facts of the note) that the composed program predicts for each example of `test`.

    The regressions are fitted on the notes of `training` and their field `note_facts`, on words or, if given, on the
    `states` of the notes. Features and strength are the ones with the best F1 of kind and applies on parts of the training
    that are held out by note, and on `validation`. Rules that no training example violates are left out.
    """
    known, tuned = (_facts_by_note(examples) for examples in (training, validation))
    notes = [note_of(report_of(example)) for example in test]
    new = list(dict.fromkeys(filter(None, notes)))
    if states is None:
        decided = _decide(known, tuned, new, [tf_idf(options) for options in TEXT_OPTIONS], WORD_STRENGTHS)
    else:
        decided = _decide(known, tuned, new, (state_features(states),), STATE_STRENGTHS)
    choose = _amount_chooser(known)
    names = {rule for example in training for rule in example["violations"]}
    rules, facts = [], []
    for example, note in zip(test, notes, strict=True):
        report, engine = printed_report(report_of(example)), example.get("engine", ())
        of_note = tuple(
            NoteFact(kind, applies, choose(note, kind), clients_in(note, report) if kind == "connected" else ())
            for kind, applies in decided.get(note, {}).items()
        )
        facts.append(of_note)
        following = rules_that_follow(report, note, of_note, engine)
        rules.append(tuple(rule for rule in following if rule in {*names, *engine}))
    return rules, facts


def rules_that_follow(report: Report, note: str, facts: Sequence[NoteFact], engine: Sequence[str]) -> list[str]:
    """Return the rules of the engine, corrected by the consequences of the note's facts.

    A report of the quickstart prints no liquidity buffer. Its note itself states the LCR without the pledged assets.
    """
    waived = any(fact.kind == "waiver" and fact.applies for fact in facts)
    rules = [rule for rule in engine if not (waived and rule == "LCR_MIN")]
    rules += [finding.rule for finding in consequences(report, (), facts)]
    stated = re.search(r"(\d+(?:\.\d+)?) ?%", note)
    if stated and not any(fact.cell == BUFFER for fact in report.facts):
        rules += ["LCR_PLEDGED" for fact in facts if fact.kind == "pledged" and fact.applies and float(stated[1]) < 100]
    return list(dict.fromkeys(rules))


def printed_report(text: str) -> Report:
    """Read the figures of a printed report, in both styles of `render.render_report`, as a report."""
    currency = re.search(r"amounts in ([A-Z]{3})\b", text)
    facts = []
    for cell, key, printed in _printed_cells(text):
        number, unit = parse_quantity(printed), None
        if number is not None:
            unit = PERCENTAGE if printed.endswith("%") else f"iso4217:{currency[1] if currency else 'EUR'}"
        if value := printed if number is None else number:
            facts.append(Fact("", value, unit, None, "", "", key, cell))
    return Report(pathlib.Path(), "", "", DATE, None, {}, tuple(facts), ())


def _printed_cells(text: str) -> Iterator[tuple[CellKey, dict[str, str], str]]:
    """Yield (cell, key of its open row, printed value) of each figure."""
    table, key = "", {}
    for line in text.splitlines():
        heading, cell, short = _TABLE.match(line), _CELL.fullmatch(line), _SHORT.fullmatch(line)
        if cell and table:
            yield (table, cell[1] or "*", cell[2]), {} if cell[1] else key, cell[3]
        elif heading:
            table, key = f"{heading[1]}_{heading[2]}", {}
        elif short and (short[1] == "Client") == bool(short[2]):
            yield _LABELS[short[1]], {"client": short[2]} if short[2] else {}, short[3]
        elif table and " | " not in line:
            key = {f"k{number}": member for number, member in enumerate(line.split())}


def clients_in(note: str, report: Report) -> tuple[str, ...]:
    """Return the clients of the report that the note mentions, by name or code, in the order of the note."""
    names = [str(fact.value) for fact in report.facts if fact.cell == NAME]
    codes = [member for fact in report.facts if fact.cell == SHARE for member in fact.keys.values()]
    places = {name: note.casefold().find(name.casefold()) for name in dict.fromkeys([*names, *codes])}
    return tuple(sorted((name for name, place in places.items() if place >= 0), key=lambda name: places[name]))


def tf_idf(options: Sequence[dict]) -> Features:
    """Return a function to TF-IDF features. options: of scikit-learn's vectorizers, whose features are joined."""

    def features(known: Sequence[str], new: Sequence[str]) -> tuple[Matrix, Matrix]:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import FeatureUnion

        union = FeatureUnion([(str(entry), TfidfVectorizer(sublinear_tf=True, **entry)) for entry in options])
        return union.fit_transform(known).tocsr(), union.transform(new).tocsr()

    return features


def state_features(states: States) -> Features:
    """Return a function to features from `hidden_states`, standardized with mean and deviation of the training texts."""

    def features(known: Sequence[str], new: Sequence[str]) -> tuple[Matrix, Matrix]:
        training, others = (np.stack([states[text] for text in texts]) for texts in (known, new))
        mean, deviation = training.mean(axis=0), training.std(axis=0) + 1e-6
        return (training - mean) / deviation, (others - mean) / deviation

    return features


def _facts_by_note(examples: Sequence[dict]) -> dict[str, list[NoteFact]]:
    notes = ((note_of(report_of(example)), true_facts(example)) for example in examples)
    return {note: facts for note, facts in notes if note and facts is not None}


def _decide(
    known: dict[str, list[NoteFact]],
    tuned: dict[str, list[NoteFact]],
    notes: Sequence[str],
    options: Sequence[Features],
    strengths: Sequence[float],
) -> dict[str, dict[str, bool]]:
    """Return note -> kind of each fact that it states -> whether the fact applies, by the best options and strength."""
    if not known:
        return {}
    texts, true = list(known), [_decisions(facts) for facts in known.values()]
    fold_of = [zlib.crc32(text.encode()) % FOLDS for text in texts]
    right = dict.fromkeys(itertools.product(options, strengths), 0.0)
    for fold in set(fold_of) if len(set(fold_of)) > 1 else ():
        kept = [i for i, fold_of_text in enumerate(fold_of) if fold_of_text != fold]
        held = [i for i, fold_of_text in enumerate(fold_of) if fold_of_text == fold]
        truth = [true[i] for i in held] + [_decisions(facts) for facts in tuned.values()]
        for features in options:
            fitted, tested = features([texts[i] for i in kept], [*(texts[i] for i in held), *tuned])
            for strength in strengths:
                predicted = _fit_and_decide(fitted, [true[i] for i in kept], tested, strength)
                right[features, strength] += sum(
                    2 * len(decided.items() & facts.items()) / max(1, len(decided) + len(facts))
                    for decided, facts in zip(predicted, truth, strict=True)
                )
    features, strength = max(right, key=lambda setting: right[setting])
    fitted, new = features(texts, notes)
    return dict(zip(notes, _fit_and_decide(fitted, true, new, strength), strict=True))


def _decisions(facts: Sequence[NoteFact]) -> dict[str, bool]:
    return {kind: any(fact.applies for fact in facts if fact.kind == kind) for kind in {fact.kind for fact in facts}}


def _fit_and_decide(
    known: Matrix, true: Sequence[dict[str, bool]], new: Matrix, strength: float
) -> list[dict[str, bool]]:
    """Fit two regressions per kind: whether a note mentions the kind, and for notes that do, whether the fact applies."""
    decisions: list[dict[str, bool]] = [{} for _ in range(new.shape[0])]
    for kind in KINDS:
        mentions = np.array([kind in facts for facts in true])
        members = np.flatnonzero(mentions).tolist()
        is_mentioned = probability(known, mentions, new, strength)
        applies = probability(known[members], np.array([true[i][kind] for i in members]), new, strength)
        for facts, of_kind, of_applying in zip(decisions, is_mentioned, applies, strict=True):
            if of_kind >= 0.5:
                facts[kind] = bool(of_applying >= 0.5)
    return decisions


def probability(known: Matrix, true: np.ndarray, new: Matrix, strength: float) -> np.ndarray:
    """Return the probability of `true` for each of `new`, by a balanced logistic regression; constant if all are equal."""
    from sklearn.linear_model import LogisticRegression

    if len(set(true.tolist())) < 2:
        return np.full(new.shape[0], float(true.any()))
    model = LogisticRegression(C=strength, solver="liblinear", class_weight="balanced").fit(known, true)
    return model.predict_proba(new)[:, 1]


def amounts_in(note: str) -> list[tuple[Decimal, str]]:
    """Return (amount in EUR, the words around it) of each amount in a note, in English or German notation."""
    decimal = "," if language_of(note) == "de" else "."
    amounts = []
    for match in _AMOUNT.finditer(note):
        scale = _SCALES.get((match["scale"] or "").casefold())
        if scale is None and not (match["currency"] or match["after"]):
            continue
        kept = (sign for sign in match["number"] if sign.isdigit() or sign == decimal)
        number = "".join(kept).replace(decimal, ".")
        if number.count(".") > 1:  # the note has this amount in the notation of the other language
            number = number.replace(".", "")
        before, after = note[: match.start()].split()[-6:], note[match.end() :].split()[:6]
        context = [f"before_{word}" for word in before] + [f"after_{word}" for word in after]
        amounts.append((Decimal(number).scaleb(scale or 0).normalize() + 0, " ".join(context).casefold()))
    return amounts


def _amount_chooser(known: dict[str, list[NoteFact]]) -> Callable[[str, str], Decimal | None]:
    """Return a function (note, kind) -> the amount of the note whose neighbouring words are the most probable, as learned."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    rows = [
        (f"kind_{fact.kind} {words}", amount == fact.amount)
        for note, facts in known.items()
        for fact in facts
        if fact.amount is not None
        for amount, words in amounts_in(note)
    ]
    if len({is_right for _, is_right in rows}) < 2:
        return lambda note, kind: next((amount for amount, _ in amounts_in(note) if kind in KINDS[:3]), None)
    vectorizer = CountVectorizer(token_pattern=r"\S+", binary=True)
    words = vectorizer.fit_transform([text for text, _ in rows])
    model = LogisticRegression(solver="liblinear").fit(words, [is_right for _, is_right in rows])

    def choose(note: str, kind: str) -> Decimal | None:
        candidates = amounts_in(note) if kind in KINDS[:3] else []
        if not candidates:
            return None
        chances = model.predict_proba(vectorizer.transform([f"kind_{kind} {words}" for _, words in candidates]))[:, 1]
        return candidates[int(chances.argmax())][0]

    return choose


def hidden_states(directory: str, texts: Sequence[str], batch_size: int = 16) -> dict[str, np.ndarray]:
    """Return text -> the mean over its tokens of a causal language model's last hidden state, `(hidden,)` in fp32."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModel

    from data.tokens import read_tokenizer
    from model.dtypes import choose_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = read_tokenizer(directory)
    model = AutoModel.from_pretrained(directory, dtype=choose_dtype("auto", device)).to(device).eval()
    tokens = {text: tokenizer(text)["input_ids"] for text in dict.fromkeys(texts)}
    order, states = sorted(tokens, key=lambda text: len(tokens[text])), {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = pad_sequence([torch.tensor(tokens[text]) for text in batch], batch_first=True).to(device)
        lengths = torch.tensor([[len(tokens[text])] for text in batch], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths).long()
        with torch.inference_mode():
            last = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        means = (last * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        states |= {text: mean.numpy() for text, mean in zip(batch, means.cpu(), strict=True)}
    return states
