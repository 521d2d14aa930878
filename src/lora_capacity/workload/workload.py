"""A workload: who sends how many requests of what length, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from lora_capacity.errors import InputError, check_number, check_path
from lora_capacity.reading import read_mapping
from lora_capacity.units import S_PER_HOUR
from lora_capacity.workload._fields import HORIZON, MAX_TOKENS, RATE
from lora_capacity.workload.adapters import AdapterClasses, Adapters
from lora_capacity.workload.arrivals import Arrivals
from lora_capacity.workload.columns import MAX_ROWS
from lora_capacity.workload.goodput import Goodput
from lora_capacity.workload.lengths import LengthDistribution
from lora_capacity.workload.over_time import Windows
from lora_capacity.workload.parsing import parse_workload
from lora_capacity.workload.requests import BASE_MODEL, Requests

MAX_REQUESTS = MAX_ROWS
"""Most requests sampled at once: as many as a recording may have."""


@dataclass(frozen=True, eq=False)
class Workload:
    """What a server of A adapters is asked for.

    Attributes:
        adapters: The adapters, of which the first A are served.
        input_tokens: Distribution of prompt lengths.
        output_tokens: Distribution of output lengths, independent of the prompt's unless there is a trace.
        base_rate_per_s: Requests per second without an adapter, >= 0.
        arrivals: Arrival process of each adapter and of the base model.
        horizon_s: Length of the time looked at, in seconds, > 0.
        max_pending: Most in-flight requests of all clients (one more enters as another completes), >= 1; None:
            unbounded.
        trace: Recorded requests that take the place of sampled ones.
        over_time: How rates change over the horizon; rates of adapters and of the base model are then means. None:
            they do not.
        goodput: Latency bounds of requests, and the share of requests that should keep them.
        shared_prefix_tokens: Tokens with which the prompts of an adapter, and those to the base model, begin alike; a
            shorter prompt is the beginning of them but for its last token. Adapters of a list may have numbers of
            their own.
        cached_share: Share of the prompts' tokens that a prefix cache holds, where no more is known, from 0 to less
            than 1.
        assumptions: What was taken for granted where files do not tell, one sentence each; answers repeat it.

    Raises:
        InputError: If a number is out of its range, both a shared prefix and a cached share are given, or only one of
            trace and ``trace`` arrivals.
    """

    adapters: Adapters
    input_tokens: LengthDistribution
    output_tokens: LengthDistribution
    base_rate_per_s: float = 0.0
    arrivals: Arrivals = field(default_factory=Arrivals)
    horizon_s: float = S_PER_HOUR
    max_pending: int | None = None
    trace: Requests | None = None
    over_time: Windows | None = None
    goodput: Goodput = field(default_factory=Goodput)
    shared_prefix_tokens: int = 0
    cached_share: float = 0.0
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_prefix()
        check_number("base_model.rate_per_s", self.base_rate_per_s, minimum=0, maximum=RATE.maximum)
        check_number("horizon_s", self.horizon_s, minimum=HORIZON.minimum, maximum=HORIZON.maximum)
        if self.max_pending is not None:
            check_number("max_pending", self.max_pending, minimum=1, integer=True)
        if (self.arrivals.process == "trace") != (self.trace is not None):
            allowed = "trace" if self.trace is not None else "poisson, gamma"
            raise InputError("arrivals.process", self.arrivals.process, allowed, "trace goes with requests.trace")
        if self.over_time is not None and not np.isclose(self.over_time.edges_s[-1], self.horizon_s, rtol=1e-6):
            end_s = float(self.over_time.edges_s[-1])
            raise InputError("horizon_s", self.horizon_s, f"{end_s:g}, the end of the traffic over time")

    def _check_prefix(self) -> None:
        name = "requests.shared_prefix_tokens"
        check_number(name, self.shared_prefix_tokens, minimum=0, maximum=MAX_TOKENS, integer=True)
        share = check_number("requests.cached_share", self.cached_share, minimum=0)
        if share >= 1:
            raise InputError("requests.cached_share", share, "a number >= 0 and < 1")
        if share > 0 and self.shares_prefix:
            raise InputError("requests.cached_share", share, "0 beside shared_prefix_tokens, which it follows from")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a workload file (YAML, or JSON where the name ends in ``.json``); tables are found relative to it.

        Args:
            path: The file.

        Raises:
            InputError: If anything about it or its tables cannot be used; says what, where, and what is allowed.
        """
        path = check_path("path", path)
        return cls.from_mapping(read_mapping(path), path.parent)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], base_dir: str | Path = ".") -> Self:
        """Build a workload from the content of a workload file.

        Args:
            mapping: The content, with the keys ``adapters``, ``base_model``, ``requests``, ``arrivals``,
                ``goodput``, ``attainment``, ``horizon_s`` and ``max_pending``. Tables may be in memory, of pandas,
                polars, Arrow or whatever Arrow reads, with the columns of the file.
            base_dir: Folder that relative paths of tables start from.

        Raises:
            InputError: As for ``from_file``.
        """
        return cls(**parse_workload(mapping, check_path("base_dir", base_dir)))

    @property
    def mean_input_tokens(self) -> float:
        """Mean prompt length in tokens."""
        return self.input_tokens.mean

    @property
    def mean_output_tokens(self) -> float:
        """Mean output length in tokens."""
        return self.output_tokens.mean

    @property
    def second_moment_input_tokens(self) -> float:
        """Mean squared prompt length in tokens²."""
        return self.input_tokens.second_moment

    @property
    def second_moment_output_tokens(self) -> float:
        """Mean squared output length in tokens²."""
        return self.output_tokens.second_moment

    @property
    def mean_input_output_tokens(self) -> float:
        """Mean of prompt length times output length in tokens²; over the recorded requests where there is a trace."""
        if self.trace is None:
            return self.input_tokens.mean * self.output_tokens.mean
        return float(np.mean(self.trace.input_tokens.astype(np.float64) * self.trace.output_tokens))

    @property
    def arrival_cv(self) -> float:
        """Coefficient of variation of the gaps between an adapter's requests."""
        return self.arrivals.cv

    @property
    def shares_prefix(self) -> bool:
        """Whether the prompts of any adapter, or those to the base model, begin alike."""
        own = getattr(self.adapters, "shared_prefix_tokens", None)
        return self.shared_prefix_tokens > 0 or (own is not None and bool(own.max() > 0))

    def shared_prefixes(self, count: int) -> Int[np.ndarray, " streams"]:
        """Return the tokens with which prompts begin alike: of the first A adapters, and last of the base model.

        Args:
            count: A, as `check_adapters` takes it.

        Returns:
            int64 ``[count + 1]``.
        """
        own = getattr(self.adapters, "shared_prefix_tokens", None)
        shared = np.full(count + 1, self.shared_prefix_tokens, np.int64)
        if own is not None:
            shared[:count] = own[:count]
        return shared

    def lasting(self, times: float) -> Self:
        """Return the workload with a horizon, and windows of traffic over time, so many times as long."""
        windows = None if self.over_time is None else self.over_time.stretched(times)
        return replace(self, horizon_s=self.horizon_s * times, over_time=windows)

    def rates_over_time(self, adapters: int) -> Float[np.ndarray, "windows {adapters}+1"]:
        """Return the requests per second of the first adapters, and last of the base model, in each window.

        Without traffic over time there is one window, the horizon.
        """
        rates = np.append(self.adapters.deal(adapters)[0], self.base_rate_per_s)
        if self.over_time is None:
            return rates[np.newaxis]
        factors = self.over_time.factors(adapters)
        return np.asarray(rates * np.concatenate([factors, self.over_time.base_factor[:, np.newaxis]], axis=1))

    @property
    def peak(self) -> int:
        """Number of the window in which most requests arrive, all adapters of a list together; 0 without windows."""
        count = self.adapters.max_count or 1  # a mix changes all alike
        return int(self.rates_over_time(count).sum(axis=1).argmax())

    def at_peak(self) -> Self:
        """Return the workload as it is in its peak window, for an hour, or as long as it lasts if that is less.

        Without traffic over time that is the workload itself.
        """
        windows = self.over_time
        if windows is None:
            return self
        rates, _ = self.adapters.deal(self.adapters.max_count or 1)
        cv = float(windows.gaps_cv(rates, self.arrival_cv)[self.peak])
        return replace(
            self,
            adapters=self.adapters.times(windows.factor[self.peak]),
            base_rate_per_s=self.base_rate_per_s * float(windows.base_factor[self.peak]),
            arrivals=self.arrivals if windows.cv is None else Arrivals("gamma", cv),
            horizon_s=max(float(windows.lengths_s[self.peak]), min(self.horizon_s, S_PER_HOUR)),
            over_time=None,
        )

    def check_adapters(self, count: object) -> int:
        """Return a number of adapters A that this workload has.

        Raises:
            InputError: If it is no whole number from 1 to the number of adapters.
        """
        return self.adapters.check_count(count)

    def classes(self, counts: ArrayLike) -> AdapterClasses:
        """Count adapters by rate and rank among the first A, for many A; see ``Adapters.classes``."""
        return self.adapters.classes(counts)

    def sample_requests(self, adapters: int, seed: int = 0) -> Requests:
        """Draw the requests of the first ``adapters`` adapters and of the base model over the horizon.

        Adapters are independent renewal processes with independent lengths, each with random streams of its own for
        arrivals, prompts and outputs: more adapters or a longer horizon add requests and change none. Where rates
        change over time, see `Windows.sample`. A trace is replayed: its requests for other adapters are left out and
        ``seed`` has no part.

        Args:
            adapters: Number of adapters A; 0 for the base model's requests alone.
            seed: Whole number >= 0; equal seeds give equal requests.

        Returns:
            The requests in order of arrival, within the horizon.

        Raises:
            InputError: If there are not so many adapters, the seed is no such number, or there would be over 20 million
                requests.
        """
        count = self.check_adapters(adapters) if adapters else 0
        seed = int(check_number("seed", seed, minimum=0, integer=True))
        if self.trace is not None:
            return self._with_prefixes(self.trace.select(self.trace.adapter < count), count)
        rates_per_s, _ = self.adapters.deal(count)
        total = (float(rates_per_s.sum()) + self.base_rate_per_s) * self.horizon_s
        if total > MAX_REQUESTS:
            most_s = f"{self.horizon_s * MAX_REQUESTS / total:.3g}"
            raise InputError(
                "horizon_s", self.horizon_s, f"a number <= {most_s} ({MAX_REQUESTS} requests at these rates)"
            )
        streams = [self._sample_stream(i, rate, seed) for i, rate in enumerate(rates_per_s.tolist())]
        if self.base_rate_per_s > 0:
            streams.append(self._sample_stream(BASE_MODEL, float(self.base_rate_per_s), seed))
        every = Requests(*(np.concatenate(columns) for columns in zip(*streams, strict=True)))
        return self._with_prefixes(every.select(np.argsort(every.arrival_s, kind="stable")), count)

    def _with_prefixes(self, requests: Requests, count: int) -> Requests:
        """Say what of each prompt is shared or cached; its last token never is."""
        if not self.shares_prefix and not self.cached_share:
            return requests
        most = requests.input_tokens - 1
        shared = self.shared_prefixes(count)[requests.adapter]  # the base model's is the last one
        cached = np.floor(self.cached_share * requests.input_tokens)
        return replace(requests, shared_prefix_tokens=np.minimum(shared, most), cached_tokens=np.minimum(cached, most))

    def _sample_stream(self, adapter: int, rate_per_s: float, seed: int) -> tuple[np.ndarray, ...]:
        """Return the columns of ``Requests`` for one adapter (or the base model)."""
        seeds = np.random.SeedSequence(seed, spawn_key=(adapter - BASE_MODEL,)).spawn(3)
        arrival_rng, input_rng, output_rng = (np.random.default_rng(each) for each in seeds)
        if self.over_time is None:
            arrival_s = self.arrivals.sample(arrival_rng, rate_per_s, float(self.horizon_s))
        else:
            own = None if adapter == BASE_MODEL else adapter
            arrival_s = self.over_time.sample(arrival_rng, own, rate_per_s, self.arrivals)
        return (
            arrival_s,
            np.full(arrival_s.size, adapter),
            self.input_tokens.sample(input_rng, arrival_s.size),
            self.output_tokens.sample(output_rng, arrival_s.size),
        )
