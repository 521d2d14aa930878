"""Problem of a search: a workload on a server, what to look for, and where."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_capacity.calibration import Calibration
from lora_capacity.engines import ServerConfig
from lora_capacity.errors import InputError, check_number
from lora_capacity.run.steady import with_classes
from lora_capacity.scenarios import build_scenarios
from lora_capacity.search.margin import assess
from lora_capacity.search.objective import Columns, Needed, Objective, choose, judge
from lora_capacity.workload import Workload

IntArray = NDArray[np.int64]

LIMITS = {"max_num_seqs": (16, 1024), "max_num_batched_tokens": (256, 16384)}
"""Batch limits that are searched, each from a small server's to the largest that vLLM takes by itself
(``EngineArgs._set_default_args`` of 0.8.5)."""

_MOST_CLASSES = 16
"""Different rates and ranks that are told apart: 200 rates over a factor of 24 merged into 16 move the throughput by
under 0.1 % (see `with_classes`), and time goes with their number."""

_GUARD_ADAPTERS = 100_000
"""Most adapters considered of an endless mix: at a request per hour each they send 28 per second, too many."""

_LEAST_STEP_S = 1e-9
"""Floor under a step's time, for calibrations in which steps cost nothing."""


@dataclass(frozen=True)
class Problem:
    """Workload, server and objective of a search, and where to look.

    Attributes:
        workload: Adapters and traffic.
        calibration: Model, GPU and coefficients.
        objective: What to look for.
        settings: Server settings that all configurations share, by vLLM's names.
        axes: Values to try of the batch limits, by vLLM's names; every combination is searched.
        adapters: Numbers of adapters to consider, None for all that could be served.
        max_loras: Numbers of slots to consider, None for all.
        threshold: Share below the offered load from which throughput counts as starved; for the objective
            ``throughput``.
        risk: Highest acceptable probability of failing: of starving, or of falling behind or missing the bounds.

    Raises:
        InputError: If a value is not allowed.
    """

    workload: Workload
    calibration: Calibration
    objective: Objective
    settings: Mapping[str, Any]
    axes: Mapping[str, Sequence[int]]
    adapters: Sequence[int] | None
    max_loras: Sequence[int] | None
    threshold: float
    risk: float

    def __post_init__(self) -> None:
        check_number("starvation_threshold", self.threshold, minimum=0, exclusive=True, maximum=0.99)
        check_number("risk", self.risk, minimum=0, exclusive=True, maximum=0.5)
        for name, values in self.axes.items():
            if not values:
                raise InputError(name, "none", "at least one value")
        for name in ("max_loras", "max_cpu_loras", *self.axes):
            if name in self.settings:
                raise InputError(name, self.settings[name], "given once", "leave it out of the other settings")

    @property
    def needed(self) -> Needed:
        """What does not fail: for the objective ``throughput`` what does not starve."""
        if self.objective.goal == "throughput":
            return Needed(1.0 - self.threshold)
        return Needed.within(self.workload.goodput)

    @cached_property
    def allowed_adapters(self) -> IntArray:
        """Numbers of adapters to consider, ascending, ``[n]``."""
        if self.adapters is None:
            return np.arange(1, self._most_adapters + 1)
        return np.array(
            [self.workload.check_adapters(count) for count in _distinct("adapters", self.adapters).tolist()]
        )

    @cached_property
    def allowed_slots(self) -> IntArray:
        """Numbers of slots to consider, ascending, ``[n]``; none above the largest number of adapters."""
        most = int(self.allowed_adapters[-1])
        if self.max_loras is None:
            return np.arange(1, most + 1)
        given = _distinct("max_loras", self.max_loras).tolist()
        slots = np.array([check_number("max_loras", count, minimum=1, integer=True) for count in given], np.int64)
        if slots[0] > most:
            raise InputError("max_loras", int(slots[0]), f"1 to {most}, the most adapters considered")
        return slots[slots <= most]

    @cached_property
    def combinations(self) -> tuple[Mapping[str, int], ...]:
        """Batch limits of every combination of the axes; those that vLLM refuses are left out if others remain."""
        every = [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]
        good = tuple(self._limits(combination) for combination in every if self._possible(combination))
        if not good:
            self.server(1, 1, **every[0])
        return good

    def steps_from(self, combination: Mapping[str, int]) -> list[Mapping[str, int]]:
        """Return combinations with a batch limit twice or half as large, of limits that are not given."""
        limits = self._limits(combination)
        free = [name for name in LIMITS if name not in self.settings and name not in self.axes]
        steps = [
            {**limits, name: value}
            for name in free
            for value in (2 * limits[name], limits[name] // 2)
            if LIMITS[name][0] <= value <= LIMITS[name][1]
        ]
        return [step for step in steps if self._possible(step)]

    def _limits(self, combination: Mapping[str, int]) -> dict[str, int]:
        server = self.server(1, 1, **combination)
        return {name: getattr(server, name) for name in LIMITS}

    def _possible(self, combination: Mapping[str, int]) -> bool:
        try:
            self.server(1, 1, **combination)
        except InputError:
            return False
        return True

    def server(self, adapters: int, max_loras: int, **more: Any) -> ServerConfig:
        """Return the settings of a server, with vLLM's defaults for those not given.

        Raises:
            InputError: If a setting is not allowed.
        """
        given = {"max_loras": max_loras, "max_cpu_loras": adapters, **self.settings, **more}
        return self.calibration.server(**given)

    def assess(self, adapters: ArrayLike, max_loras: ArrayLike, loads: int = 3, **more: Any) -> Columns:
        """Predict configurations; see `lora_capacity.search.assess`.

        Adapters of more than 16 different rates and ranks are merged, see `with_classes`.
        """
        given = {**self.settings, **more}
        scenarios = build_scenarios(self.workload, self.calibration, np.asarray(adapters), max_loras, **given)
        return assess(
            self.calibration,
            with_classes(scenarios, self._classes),
            self.workload,
            needed=self.needed,
            risk=self.risk,
            loads=loads,
        )

    def judge(self, columns: Columns) -> NDArray[Any]:
        """Return a verdict on each configuration; see `lora_capacity.search.judge`."""
        return judge(columns, self.needed, self.risk)

    def choose(self, columns: Columns) -> int | None:
        """Return the index of the configuration to take; see `lora_capacity.search.choose`."""
        return choose(columns, self.objective, self.needed, self.risk)

    @cached_property
    def _classes(self) -> int:
        most = int(self.allowed_adapters[-1])
        return min(self.workload.classes([most]).rate_per_s.size, _MOST_CLASSES)

    @cached_property
    def _most_adapters(self) -> int:
        """The fewest adapters that fail whatever the slots, or all there are.

        No server outruns steps that are full and cost nothing but their base and their tokens: ``budget / (base_s +
        budget · token_s)`` tokens per second.
        """
        step = self.calibration.costs.step
        budget = max(self.server(1, 1, **combination).max_num_batched_tokens for combination in self.combinations)
        fastest_per_s = budget / max(np.asarray(step.base_s + budget * step.token_s).item(), _LEAST_STEP_S)
        per_request = self.workload.mean_input_tokens + self.workload.mean_output_tokens
        most_per_s = fastest_per_s / per_request / self.needed.service - self.workload.base_rate_per_s
        bound = self.workload.adapters.max_count or _GUARD_ADAPTERS
        count = 1
        while True:
            rates, _ = self.workload.adapters.deal(count)
            total = np.cumsum(rates)
            if total[-1] > most_per_s or count == bound:
                return min(int(np.searchsorted(total, most_per_s, side="right")) + 1, count)
            count = min(2 * count, bound)


def _distinct(name: str, values: ArrayLike) -> IntArray:
    distinct: IntArray = np.unique(np.asarray(values))
    if not distinct.size:
        raise InputError(name, "none", "at least one value")
    return distinct
