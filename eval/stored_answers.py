"""Read and write answers as JSON Lines of `id` and `answer`, and score answers that any model or service has given."""

import hashlib
from collections import Counter
from pathlib import Path

from common.durable_files import write_json_lines
from common.errors import UserError
from data.files import DEFAULT, Reading, check_files
from data.formats import read_examples
from data.messages import check_unicode
from data.rows import read_rows
from eval import report
from eval.asked_examples import ScoreAnswers, choose_examples, has_answer
from eval.results import read_result


def write_answers(path: Path, texts: list[str], examples: list[dict]) -> None:
    """Write the answers to the examples. An example without an id gets its place in the list, from 1, as id."""
    pairs = enumerate(zip(examples, texts, strict=True))
    write_json_lines(path, [{"id": _name(example, i), "answer": text} for i, (example, text) in pairs])


def score_stored(
    data: Path,
    answers: Path,
    score_answers: ScoreAnswers,
    train: Path | None = None,
    limit: int | None = None,
    before: Path | None = None,
    reading: Reading = DEFAULT,
) -> tuple[dict, dict | None]:
    """Score the `answers` to the examples of `data`. Return (their result, the earlier result in the file `before`).

    The result has the keys of scripts/evaluate.py that need no model. Raise UserError if an answer is missing, stands twice, or
    belongs to no example, and where `score_answers` does.
    """
    all_examples = read_examples(data, reading)
    examples = choose_examples(all_examples, limit)
    asked = [example for example in examples if has_answer(example)]
    if not asked:
        raise UserError(f"no example of {data} is a chat with an answer, so there is nothing to score (docs/data.md)")
    training = list(filter(has_answer, read_examples(train, reading))) if train else None
    earlier = read_result(before) if before else None
    header = {
        "model": str(answers),
        "data": str(data),
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "n_examples": len(examples),
        "n_in_file": len(all_examples),
    }
    if earlier:
        report.check_comparable(earlier, header)
    names, answer_by_id = [_name(example, i) for i, example in enumerate(asked)], read_answers(answers)
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(
                f"{data}: the id {name} stands twice, so answers cannot be told apart; give each example its own"
            )
    if missing := [name for name in names if name not in answer_by_id]:
        raise UserError(
            f"{answers}: the answer to {_listed(missing)} of {data} is missing; --limit scores a part of them"
        )
    if unknown := sorted(set(answer_by_id) - set(names)):
        raise UserError(f"{answers}: {_listed(unknown)} is no example of {data} that is scored; remove the answer")
    texts = [answer_by_id[name] for name in names]
    return header | score_answers(texts, asked, str(data), training, str(train)), earlier


def read_answers(path: Path) -> dict[str, str]:
    """Return id -> answer. Raise UserError, with the line, for the first row that is malformed or repeats an id."""
    check_files([path])
    answer_by_id: dict[str, str] = {}
    for where, row in read_rows(path):
        if isinstance(row, UserError):
            raise row
        if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("answer"), str):
            raise UserError(f"{where}: it needs the keys id and answer, the answer as a text, in .jsonl, .json or .csv")
        name = check_unicode(str(row["id"]), where)
        if name in answer_by_id:
            raise UserError(f"{where}: the answer to {name} stands twice; keep one of them")
        answer_by_id[name] = check_unicode(row["answer"], where)
    return answer_by_id


def _listed(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _name(example: dict, index: int) -> str:
    return str(index + 1 if example.get("id") is None else example["id"])
