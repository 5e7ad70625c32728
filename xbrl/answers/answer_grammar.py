"""The grammar of an answer as a regular expression: headings, rule ids and the shape of a line are fixed, the rest is free.

With it a model that was never trained on the form of the answers can be asked what it knows of their content.
"""

import re
from collections.abc import Sequence

from common.errors import UserError
from xbrl.rules.findings import note_rules
from xbrl.rules.note_facts import KINDS
from xbrl.rules.rules import built_in_rules

LETTER = "\nDirective:\n"  # what follows it is free
MAX_LINES = 12
MAX_FACTS = 3
_NAME = r"[\w ,()/&'’*+-]"  # a character of a cell, a client or a ratio
_LEGAL = r"[A-Z0-9][A-Za-z0-9 ,;()/.-]{2,100}"
_FIGURE = r"-?\d{1,15}(?:\.\d{1,6})?(?:%| thousand| million| bn| mn| k)?"


def answer_grammar(examples: Sequence[dict]) -> str:
    """The pattern of the answers of `examples`: of the forms that their own answers have.

    It is made for partial matching: every prefix of a match can be continued. Raises `UserError` if no answer has one of
    them.
    """
    answers = [example["messages"][-1]["content"].lstrip() for example in examples]
    rules = [rule.id for rule in built_in_rules() if rule.kind != "trigger"] + list(note_rules())
    ids = "|".join(map(re.escape, rules))
    cell = rf"(?:{_NAME.replace(' ', '')}|\.)(?:{_NAME}|\.){{0,59}}"  # a cell of blanks would be none
    violation = rf"(?:{ids}) \| {cell} \| (?:not reported|{_FIGURE}) \| (?:min|max|expected) {_FIGURE} \| {_LEGAL}"
    value = rf"(?:{_FIGURE}|{_FIGURE}(?: [-+] {_FIGURE}){{1,3}} = {_FIGURE})"
    verdict = rf"(?:met|(?:lifts )?(?:{ids}), {_LEGAL})"
    check = rf"[A-Z]{_NAME}{{1,160}}?(?: {value}(?: [<>]=? {_FIGURE})?)?: {verdict}"
    who = r"(?:-|[^\s|-][^|\n]{1,119}?)"
    fact = (
        rf"(?:{'|'.join(KINDS)}) \| (?:applies|does not apply) \| (?:-|EUR [1-9]\d{{5,11}}) \| {who} \| "
        r"(?:-|20\d\d-[01]\d-[0-3]\d) \| \"[^\n|]{10,300}?\""
    )
    violations = rf"Violations:\n(?:none|{violation}(?:\n{violation}){{0,{MAX_LINES - 1}}})"
    forms = {
        "Note:": rf"Note:\n(?:none|{fact}(?:\n{fact}){{0,{MAX_FACTS - 1}}})\n{violations}",
        "Violations:": violations,
        "Checks:": rf"Checks:\n{check}(?:\n{check}){{0,{MAX_LINES - 1}}}",
    }
    used = [form for heading, form in forms.items() if any(answer.startswith(heading) for answer in answers)]
    if not used:
        raise UserError(
            "--constrained knows the answers of this project only, and none of the examples starts with `Note:`, "
            "`Violations:` or `Checks:`; leave the option out"
        )
    return rf"(?:{'|'.join(used)}){LETTER}.+"
