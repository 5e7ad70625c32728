"""Recognise rows of preference data, and say which setting trains on their preferred answer.

Training here learns from one answer; a loss over pairs (DPO) is not built. Such a row is refused until a setting names the
answer to train on, because it often has keys of a known form as well: HuggingFaceH4/ultrafeedback_binarized has `messages`.
"""

from typing import Any

from configs.load import REQUIRED
from data.files import CHOSEN, REJECTED, SCORED_ANSWERS
from data.messages import MESSAGE_LIST, parse_json_text

# An example that `data.row` makes from a row of openbmb/UltraFeedback. Its `overall_score` is a number from 1 to 10.
BEST_ANSWER = (
    'def best(row): return {"instruction": row["instruction"], "output": max(row["completions"], '
    'key=lambda answer: answer["overall_score"])["response"]}'
)
# An example from a text prompt and a list of messages that begins with the answer.
PROMPT_AND_MESSAGES = (
    'def chosen(row): return {"messages": [{"role": "user", "content": row["prompt"]}] + row["chosen"]}'
)


def preference_advice(row: dict, where: str) -> str | None:
    """Return a sentence that names the kind of preference row and the setting that trains on its best answer.

    Return None for any other row. `row` has our names of the keys: no `chosen` is left if data.fields names it. Raise UserError
    for a cell that looks like messages and is not JSON.
    """
    if CHOSEN in row and REJECTED in row:
        return (
            f"{where} is a row of preferences (`{CHOSEN}`, `{REJECTED}`), and training here learns from one answer, not from a "
            f"pair: {_settings(row, where)}"
        )
    answers = row.get(SCORED_ANSWERS)
    if isinstance(answers, list) and answers and all(isinstance(each, dict) and "response" in each for each in answers):
        return (
            f"{where} has {len(answers)} scored answers in `{SCORED_ANSWERS}`, as UltraFeedback has, and training here learns "
            f"from one: choose it with data.row=MODULE:best, such as `{BEST_ANSWER}`"
        )
    return None


def _settings(row: dict, where: str) -> str:
    """Return the settings that train on `chosen`, and the setting that keeps a form which the row has as well."""
    prompt, chosen = (_messages_of(row.get(key), where, key) for key in ("prompt", CHOSEN))
    if isinstance(chosen, list):
        begins_with_answer = bool(chosen) and isinstance(chosen[0], dict) and chosen[0].get("role") == "assistant"
        if begins_with_answer and isinstance(prompt, str):
            advice = f"join both with data.row=MODULE:chosen, such as `{PROMPT_AND_MESSAGES}`"
        else:
            key = "completion" if begins_with_answer and prompt is not None else "messages"
            advice = f"data.fields={key}={CHOSEN} trains on `{CHOSEN}` alone"
    elif isinstance(prompt, str):
        advice = (
            f"data.fields=instruction=prompt,output={CHOSEN} trains on `{CHOSEN}` alone, as a chat; "
            f"data.fields=completion={CHOSEN}, as plain text"
        )
    else:
        advice = (
            f"split `{CHOSEN}` into `messages` with a function in data.row, or take it as one plain text with "
            f"data.fields=text={CHOSEN}"
        )
    form = next((form for form, needed in REQUIRED.items() if all(key in row for key in needed)), None)
    return advice + (f"; data.format={form} trains on its `{REQUIRED[form][-1]}`" if form else "")


def _messages_of(value: Any, where: str, key: str) -> Any:
    """Return a cell of a .csv file that spells messages as a list, and any other value unchanged."""
    return parse_json_text(value, where, key) if isinstance(value, str) and MESSAGE_LIST.match(value) else value
