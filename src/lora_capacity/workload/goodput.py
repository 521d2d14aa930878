"""Latency bounds of requests, as in ``vllm bench serve --goodput``, and how many requests have to keep them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isinf
from typing import Any, Self

from lora_capacity.errors import check_keys, check_number, check_type
from lora_capacity.units import MS_PER_S

BOUNDED = ("ttft", "tpot", "e2el")
"""What can be bounded, by vLLM's keys: time to first token, time per output token after it, time to the last."""

_TTFT_S = 2.0
"""Bound on the time to first token where nothing is asked for: people who watch an answer appear wait about as long."""

_ATTAINMENT = 0.95
"""Share of requests that has to keep its bounds where none is asked for: the percentile that bounds are stated at."""


@dataclass(frozen=True)
class Goodput:
    """What a request has to keep to count as good.

    Attributes:
        ttft_s: Longest time to first token, > 0; infinite where it is not bounded, as the next two.
        tpot_s: Longest time per output token after the first, a mean over the request.
        e2el_s: Longest time to the last token.
        attainment: Share of arriving requests that should keep all of these, above 0, at most 1.

    Raises:
        InputError: If a number is out of its range.
    """

    ttft_s: float = _TTFT_S
    tpot_s: float = inf
    e2el_s: float = inf
    attainment: float = _ATTAINMENT

    def __post_init__(self) -> None:
        for key in BOUNDED:
            bound_s = getattr(self, f"{key}_s")
            if not (isinstance(bound_s, float) and isinf(bound_s) and bound_s > 0):
                check_number(f"goodput.{key}", bound_s, minimum=0, exclusive=True)
        check_number("attainment", self.attainment, minimum=0, maximum=1, exclusive=True)

    @classmethod
    def from_ms(cls, bounds_ms: Mapping[str, Any], attainment: float = _ATTAINMENT) -> Self:
        """Return bounds from milliseconds by vLLM's keys; what has no key is not bounded.

        Args:
            bounds_ms: ``ttft``, ``tpot`` and ``e2el``, at least one.
            attainment: As the attribute.

        Raises:
            InputError: If a key is unknown, or a number is out of its range.
        """
        check_type("goodput", bounds_ms, Mapping, f"a mapping of {', '.join(BOUNDED)} to milliseconds")
        check_keys("goodput", bounds_ms, BOUNDED)
        checked = {
            key: check_number(f"goodput.{key}", value, minimum=0, exclusive=True) for key, value in bounds_ms.items()
        }
        bounds_s = {f"{key}_s": checked.get(key, inf) / MS_PER_S for key in BOUNDED}
        return cls(**bounds_s, attainment=attainment)

    def changed(self, bounds_ms: Mapping[str, Any] | None = None, attainment: float | None = None) -> Self:
        """Return what is asked for with other bounds or another attainment, each where one is given.

        Args:
            bounds_ms: As of `from_ms`; they take the place of all bounds.
            attainment: As the attribute.

        Raises:
            InputError: As `from_ms`.
        """
        share = self.attainment if attainment is None else attainment
        return replace(self, attainment=share) if bounds_ms is None else type(self).from_ms(bounds_ms, share)

    def to_ms(self) -> dict[str, float]:
        """Return the bounds in milliseconds by vLLM's keys, without those that are not bounded."""
        bounds_ms = {key: getattr(self, f"{key}_s") * MS_PER_S for key in BOUNDED}
        return {key: bound_ms for key, bound_ms in bounds_ms.items() if not isinf(bound_ms)}
