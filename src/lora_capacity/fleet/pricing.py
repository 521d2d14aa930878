"""Column generation: servers looked for at the prices of those found, and the bound that prices give."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lora_capacity.fleet.columns import Columns
from lora_capacity.fleet.master import Question, relax, whole

FloatArray = NDArray[np.float64]

_IMPROVES = 1.0 + 5e-3
"""Cost of the relaxed problem over its bound down to which servers are priced: a fiftieth of a server in four."""

_SMOOTHING = 0.5
"""Share of the values with the best bound so far in those that are priced next: the linear program's own swing from
one round to the next while few servers are known (Wentges 1997)."""


def generate(columns: Columns, question: Question, rounds: int, progress: Callable[[int, int], None]) -> float:
    """Look for servers until pricing finds none that improves, and return the bound below what they cost.

    The bound is that of Farley: values at which no server holds more than it costs are values that no cover goes
    below. Where all servers are known it is that of whole numbers.
    """
    if columns.exact or columns.enumerate():
        use, left = whole(question, columns.found)
        return float(question.price[columns.found.pool] @ use) if not left.any() else 0.0
    columns.spread()
    plain = columns.plain_values() if columns.centre is None else [columns.centre]
    values: list[FloatArray] = []
    for done in range(rounds):
        progress(done, rounds)
        relaxed = relax(question, columns.found)
        if done < len(plain):
            values.append(plain[done])
        else:
            values.append(_SMOOTHING * _best(values, question, columns)[1] + (1.0 - _SMOOTHING) * relaxed.value)
        columns.price(values[-1])
        if relaxed.cost <= _IMPROVES * _best(values, question, columns)[0]:
            break
    progress(rounds, rounds)
    bound, columns.centre = _best(values, question, columns)
    return bound


def _best(values: list[FloatArray], question: Question, columns: Columns) -> tuple[float, FloatArray]:
    """Return the best bound that values give by all servers found so far, and these values, scaled to it."""
    worth = columns.found.counts @ np.array(values).T
    most = (worth / question.price[columns.found.pool, np.newaxis]).max(axis=0)
    bounds = np.array(values) @ question.demand / most
    best = int(np.argmax(bounds))
    return float(bounds[best]), values[best] / most[best]
