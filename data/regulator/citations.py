"""Read citations of law: `CRR Art. 92(1)(a)`, `Articles 102 and 104(1) CRD`, `Article 412(1) of Regulation (EU) No 575/2013`.

An article is the pair (act, number), e.g. ("CRR", "92(1)(a)"). Acts without a usual short name are named by their number,
e.g. ("2015/61", "4(2)").
"""

import re

_ACTS = {"575/2013": "CRR", "2013/36": "CRD"}
_NUMBER = r"\d+[a-z]{0,2}(?: ?\(\w+\))*(?:-\(\w+\))?"
_TOKEN = re.compile(
    rf"(?P<act>\b(?:CRR|CRD)\b|\b\d{{3,4}}/\d+\b)"
    rf"|\b(?:Articles?|Arts?)\b\.? ?(?P<first>{_NUMBER})(?P<more>(?: ?(?:,|and|or|to) (?:Art\. ?)?{_NUMBER}(?![\w/%.]))*)"
    r"|\b(?P<annex>Annex [IVXLC]+)\b",
    re.IGNORECASE,
)


def articles(text: str) -> frozenset[tuple[str, str]]:
    """All articles that a text cites, normalised.

    Within a sentence, an article belongs to the act before it if the sentence names the act first (`CRR Art. 92`), else to
    the act after it (`Article 92 CRR`), or else to the last one. An article of a clause without an act has the act "".
    """
    found: set[tuple[str, str]] = set()
    for clause in re.split(r";|\n|(?<=[\w)])\. (?=[A-Z])", re.sub(r"\b(Arts?)\. ", r"\1 ", text)):
        found |= _articles_of_clause(clause)
    return frozenset(found)


def _articles_of_clause(clause: str) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    act, waiting = "", []
    tokens = list(_TOKEN.finditer(clause))
    act_first = bool(tokens) and bool(tokens[0]["act"])
    for token in tokens:
        if token["act"]:
            act = _ACTS.get(token["act"], token["act"].upper())
            if not act_first:
                found |= {(act, number) for number in waiting}
                waiting = []
            continue
        numbers = [token["annex"]] if token["annex"] else re.findall(_NUMBER, f"{token['first']}{token['more']}")
        numbers = [re.sub(r"\s", "", number) if not token["annex"] else number for number in numbers]
        if act_first:
            found |= {(act, number) for number in numbers}
        else:
            waiting += numbers
    return found | {(act, number) for number in waiting}
