"""Requests of which tables show the first ones, since clients hold most of them back: what the others change."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.twins.events import RequestTables
from lora_capacity.twins.events.requests import TICKS

NEVER = np.iinfo(np.int32).max
"""Arrival of a row of a table that holds no request."""


class LeftOut(NamedTuple):
    """How many requests of one configuration its table leaves out.

    Attributes:
        by_adapter: Those of each adapter, ``[adapters]``.
        observed: Those after the warm-up, the base model's with them.
    """

    by_adapter: NDArray[np.int64]
    observed: int


@dataclass(frozen=True, eq=False)
class Drawn:
    """The requests of some configurations: the first ones in tables, the others only counted.

    Attributes:
        scenarios: The configurations, ``[configs]``.
        tables: What their servers are sent as long as it lasts.
        left_out: What arrives after that within the horizon, by configuration; None where nothing does.
        keys: Seeds of the order of adapters in the tables, by configuration.
        warmup_s: Time at the beginning that attainment leaves out.
    """

    scenarios: Scenarios
    tables: RequestTables
    left_out: Sequence[LeftOut | None]
    keys: Sequence[Sequence[int]]
    warmup_s: float = 0.0

    @property
    def cut(self) -> NDArray[np.bool_]:
        """Whether a table leaves out any, ``[configs]``."""
        return np.array([each is not None for each in self.left_out])

    def too_few(self, results: Results, sent: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return whether a configuration has to be run with more requests in its table, ``[configs]``.

        Args:
            results: What the twin says.
            sent: Requests that clients have sent, ``[configs]``. If those are all of a table, the server has been idle
                where others would have been sent. Attainment, a share of the table's arrivals after the warm-up, is
                known only where those are more than the answered requests.
        """
        events: Any = results.events
        shown = (np.asarray(self.tables.arrival) < NEVER).sum(axis=1)
        answered = events.quantile_requests[:, 0] - events.unanswered
        observed, _ = self._observed()
        return np.asarray(self.cut & ((sent >= shown) | (answered > observed)))

    def of_all_arrivals(self, results: Results) -> Results:
        """Return results whose attainment and service of classes are shares of all arrivals, not of a table's alone."""
        cut = self.cut
        if not cut.any():
            return results
        events: Any = results.events
        class_of = np.asarray(self.tables.class_of)
        own, classes = class_of.shape[1], results.class_service.shape[1]
        arrived = events.adapter_arrived[:, :own] + self._left_out_of_adapters()
        member = class_of[..., np.newaxis] == np.arange(classes)
        of_class, completed = (
            (count[..., np.newaxis] * member).sum(axis=1) for count in (arrived, events.adapter_completed[:, :own])
        )
        blank = np.where(self.scenarios.starts, 0.0, np.nan)
        service = np.where(of_class > 0, completed / np.maximum(of_class, 1), np.nan) + blank[:, np.newaxis]
        observed, more = self._observed()
        attainment = np.where(observed > 0, results.attainment * observed / np.maximum(observed + more, 1), 0.0) + blank
        wider = np.pad(arrived, [(0, 0), (0, events.adapter_arrived.shape[1] - own)]).astype(np.int32)
        told: Any = {
            "class_service": np.where(cut[:, np.newaxis], service, results.class_service).astype(np.float32),
            "attainment": np.where(cut, attainment, results.attainment).astype(np.float32),
            "events": dataclasses.replace(events, adapter_arrived=wider),
        }
        changed: Results = dataclasses.replace(results, **told)
        return changed

    def _observed(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count the arrivals after the warm-up that tables hold, and those that they leave out, each ``[configs]``."""
        arrival = np.asarray(self.tables.arrival)
        warmup = np.round(self.warmup_s / np.asarray(self.scenarios.horizon_s)[:, np.newaxis] * TICKS)
        held = ((arrival >= warmup) & (arrival < TICKS)).sum(axis=1)
        return np.asarray(held), np.array([0 if each is None else each.observed for each in self.left_out])

    def _left_out_of_adapters(self) -> NDArray[np.int64]:
        """Return how many are left out of each adapter, in the tables' order, ``[configs, adapters]``."""
        counts = np.zeros(np.shape(self.tables.class_of), dtype=np.int64)
        for row, (each, key) in enumerate(zip(self.left_out, self.keys, strict=True)):
            if each is not None:
                own = each.by_adapter.size
                counts[row, :own] = each.by_adapter[order_of_touching(own, key)]
        return counts


def order_of_touching(adapters: int, key: Sequence[int]) -> NDArray[np.int64]:
    """Return the adapters in the order in which a step touches them."""
    return np.random.default_rng([*key, 1]).permutation(np.arange(adapters))


def order_of_loading(adapters: int, key: Sequence[int]) -> NDArray[np.int64]:
    """Return where the adapters stand in the order of touching, in the workload's order: that of loading them."""
    return np.argsort(order_of_touching(adapters, key))
