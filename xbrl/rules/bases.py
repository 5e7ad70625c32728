"""The legal basis of a letter: which provisions it cites, and how the bank is heard and can object.

CRR is a regulation and binds banks directly. CRD is a directive and binds them only through the national law that
transposes it (TFEU Art. 288). So what a letter rests on is data: `bases.json` has the basis "model", which cites CRR and
CRD and says so, and "de" as an example of a national one. A supervisor adds their own, or names another file:

- `binding`: the sentence that says what binds the bank; `requirements`: rule -> citation in place of the rule's own;
- `powers`: subject of a measure (measures.py) -> what entitles the authority to demand it;
- `penalty`, `licence`: what a letter cites where it announces them; `hearing` (`working_days`) and `objection` (`months`,
  `suspends`: whether it suspends the measures): every letter says both.

`checked` is a remark for readers: "text" if the provision was read, "memory" if not.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from xbrl.rules.measures import DEADLINES, Measure, topic_of
from xbrl.rules.rules import RuleResult

BASES_FILE = Path(__file__).with_name("bases.json")


@dataclass(frozen=True)
class Basis:
    """A legal basis; the module describes it."""

    binding: str
    requirements: Mapping[str, str]
    powers: Mapping[str, str]
    penalty: str
    licence: str
    hearing: str
    hearing_days: int  # working days from receipt
    objection: str
    objection_months: int  # from receipt
    suspends: bool  # whether an objection suspends the measures

    def cite(self, result: RuleResult) -> str:
        """The provision that a finding violates."""
        return self.requirements.get(result.rule_id, result.legal)

    def power_for(self, measures: Iterable[Measure]) -> str:
        """What the measures of a letter rest on, each provision once."""
        cited = (provision for measure in measures for provision in self.powers[topic_of(measure)].split("; "))
        return "; ".join(dict.fromkeys(cited))


def load_basis(name: str = "model", path: Path = BASES_FILE) -> Basis:
    """The basis with this name. Raises `UserError` for an unknown name or an incomplete file."""
    bases = json.loads(path.read_text(encoding="utf-8"))
    if name not in bases:
        raise UserError(f"{path}: there is no legal basis {name!r}; it has {', '.join(bases)}")
    row = bases[name]
    try:
        basis = Basis(
            binding=row["binding"],
            requirements=row["requirements"],
            powers={subject: provision["law"] for subject, provision in row["powers"].items()},
            penalty=row["penalty"]["law"],
            licence=row["licence"]["law"],
            hearing=row["hearing"]["law"],
            hearing_days=row["hearing"]["working_days"],
            objection=row["objection"]["law"],
            objection_months=row["objection"]["months"],
            suspends=row["objection"]["suspends"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}, {name}: {error}; xbrl/rules/bases.py describes the keys") from error
    missing = {subject for subject, _ in DEADLINES} - basis.powers.keys()
    if missing:
        raise UserError(f"{path}, {name}, powers: {', '.join(sorted(missing))} is missing")
    return basis
