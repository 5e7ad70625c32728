"""Which rule is taken for which: a confusion matrix for reports that break several rules, or none."""

from collections.abc import Sequence

import numpy as np

from eval.comparison.measures import labels

NONE = "none"


def confusion(answers: Sequence[dict], names: Sequence[str]) -> np.ndarray:
    """`(names + 1, names + 1)`: rows are the truth, columns the answer; the last of each is `NONE`.

    A report may have several rules, so a wrong one is not a pair. Rules that are found stand on the diagonal. Of the m rules
    that a report's answer misses and the k that it invents, each missed one is spread evenly over the invented ones, with
    weight 1 / max(m, k) a pair; what is left goes to the column `none` (missed), or to the row `none` (invented). The sum of
    a row is thus the number of true findings, that of a column the number of predicted ones. A clean report that is called
    clean counts once in none, none.
    """
    place = {name: i for i, name in enumerate(names)}
    last = len(names)
    matrix = np.zeros((last + 1, last + 1))
    for answer in answers:
        true, said = labels(answer)
        for name in true & said:
            matrix[place[name], place[name]] += 1
        missed, invented = [place[name] for name in true - said], [place[name] for name in said - true]
        share = 1 / max(len(missed), len(invented), 1)
        for row in missed:
            matrix[row, invented] += share
            matrix[row, last] += 1 - share * len(invented)
        for column in invented:
            matrix[last, column] += 1 - share * len(missed)
        if not true and not said:
            matrix[last, last] += 1
    return matrix
