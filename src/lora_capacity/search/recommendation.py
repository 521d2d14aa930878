"""Recommendation: the configuration to run, how safe it is, what is next to it and why."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from lora_capacity.engines import ServerConfig, environment
from lora_capacity.search.objective import Columns, Objective
from lora_capacity.words import bottleneck, gibibytes, percent, plural, shown, spoken
from lora_capacity.workload import Goodput, Workload

_COMPARED = {
    "throughput_tokens_per_s": "throughput",
    "itl_s": "inter-token latency",
    "ttft_s": "time to first token",
    "attainment": "requests within bounds",
}
"""Figures in which the twins are compared, and their names."""

_TIMES = 2.0
"""Ratio from which on a difference is told as a multiple: percentages above 100 are hard to read."""

_SETTINGS = ("max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")


@dataclass(frozen=True)
class Candidate:
    """One configuration and what is predicted of it; numbers are NaN where the server does not start.

    Attributes:
        max_cpu_loras: Adapters served, A.
        max_loras: Slots, S.
        max_lora_rank: Rank that the slots are reserved for.
        max_num_seqs: Most running requests.
        max_num_batched_tokens: Most tokens in a step.
        kv_cache_tokens: Tokens that the KV cache holds.
        throughput_tokens_per_s: Input plus output tokens of completed requests per second.
        offered_tokens_per_s: Arriving tokens per second.
        service: Throughput as a share of the offered load.
        served: Share of arriving requests that are served by the end or in service.
        attainment: Share of arriving requests that keep the workload's bounds.
        goodput_per_s: Requests per second that do.
        itl_s: Mean inter-token latency.
        tpot_s: Mean over requests of their time per output token after the first.
        ttft_s: Mean time to first token.
        client_itl_s: Mean inter-token latency as clients see it, behind the server's front end, as the next two.
        client_tpot_s: Mean over requests of their time per output token after the first.
        client_ttft_s: Mean time to first token.
        mean_running: Requests in the batch.
        mean_waiting: Requests waiting.
        active_adapters: Different adapters in the batch.
        kv_usage: Share of the KV cache in use.
        loads_per_s: Adapter loads into GPU slots per second.
        limit: Bottleneck at the offered load (`Bottleneck` label; ``none`` while it keeps up).
        limit_beyond: Bottleneck at the load at which it fails; empty if it fails at no load tried.
        critical_load: Headroom: times the offered load at which it fails, which is to starve with the objective
            ``throughput``, else to fall behind or miss the bounds; the highest load tried if it does not fail there.
        starving_probability: Chance that it fails, given the calibration's error and the next.
        extrapolation_error: What lying beyond the ranges that the calibration was fitted over adds to the error of the
            capacity: a standard deviation of its logarithm; 0 within.
        status: `Status` label.
    """

    max_cpu_loras: int
    max_loras: int
    max_lora_rank: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int
    throughput_tokens_per_s: float
    offered_tokens_per_s: float
    service: float
    served: float
    attainment: float
    goodput_per_s: float
    itl_s: float
    tpot_s: float
    ttft_s: float
    client_itl_s: float
    client_tpot_s: float
    client_ttft_s: float
    mean_running: float
    mean_waiting: float
    active_adapters: float
    kv_usage: float
    loads_per_s: float
    limit: str
    limit_beyond: str
    critical_load: float
    starving_probability: float
    extrapolation_error: float
    status: str

    @classmethod
    def from_columns(cls, columns: Columns) -> list[Self]:
        """Return one candidate per row of the columns that `assess` returns."""
        names = [entry.name for entry in fields(cls)]
        rows = zip(*(columns[name].tolist() for name in names), strict=True)
        return [cls(**dict(zip(names, row, strict=True))) for row in rows]


@dataclass(frozen=True)
class Neighbour:
    """A configuration with one adapter or slot more or less.

    Attributes:
        change: ``one more adapter``, ``one more slot`` or ``one slot fewer``.
        candidate: The configuration.
        gain_tokens_per_s: Throughput that it brings over the recommended one; negative: costs; NaN: does not start.
        verdict: Label of `judge`.
    """

    change: str
    candidate: Candidate
    gain_tokens_per_s: float
    verdict: str


@dataclass(frozen=True)
class MemoryMargin:
    """How far the recommended server is from not starting.

    Attributes:
        kv_cache_tokens: Tokens that the KV cache holds.
        spare_kv_cache_tokens: Tokens beyond one request of ``max_model_len``, below which vLLM refuses to start.
        spare_bytes: GPU memory free at the tightest moment of the start.
    """

    kv_cache_tokens: int
    spare_kv_cache_tokens: int
    spare_bytes: float


@dataclass(frozen=True)
class Played:
    """What the event twin says of the recommended configuration.

    Attributes:
        seeds: Seeds that it was played with, none of which the search has seen.
        mean: Means over them; ``critical_load`` and ``starving_probability`` with the chance of an hour, which
            is what they differ by.
        error: Standard deviation of the logarithm of the capacity, of the seeds and the calibration together.
        refused: How many configurations these seeds refused.
    """

    seeds: tuple[int, ...]
    mean: Candidate
    error: float
    refused: int

    def differences(self, steady: Candidate) -> dict[str, float]:
        """Return how far the steady twin's figures lie from these.

        Args:
            steady: The same configuration as the steady twin predicts it.

        Returns:
            Shares of these figures, by name; positive where the steady twin says more.
        """
        pairs = {name: (getattr(steady, name), getattr(self.mean, name)) for name in _COMPARED}
        return {name: other / own - 1.0 if own else math.nan for name, (other, own) in pairs.items()}


@dataclass(frozen=True)
class OverTime:
    """What a plan for the peak of traffic over time leaves unused.

    Attributes:
        peak_start_s: Where the peak window begins.
        peak_end_s: Where it ends.
        peak_per_s: Requests per second of the adapters served and the base model in it.
        mean_per_s: The same over the horizon.
        unused: Share of the requests which the server could take over the horizon, each second as many as it keeps
            its bounds with, that do not come.
    """

    peak_start_s: float
    peak_end_s: float
    peak_per_s: float
    mean_per_s: float
    unused: float

    @classmethod
    def of(cls, workload: Workload, told: Candidate) -> Self:
        """Return what a plan leaves unused of a workload whose traffic changes over time."""
        windows: Any = workload.over_time
        rates = workload.rates_over_time(told.max_cpu_loras).sum(axis=1)
        mean, peak = float(rates @ windows.lengths_s / workload.horizon_s), float(rates[workload.peak])
        start_s, end_s = windows.edges_s[workload.peak : workload.peak + 2].tolist()
        return cls(start_s, end_s, peak, mean, 1.0 - mean / (peak * max(told.critical_load, 1.0)))

    @property
    def words(self) -> str:
        """What it says, in a sentence."""
        return (
            f"Planned for the peak, {self.peak_start_s:,.0f} to {self.peak_end_s:,.0f} s, with "
            f"{shown(self.peak_per_s)} requests/s; on average {shown(self.mean_per_s)} arrive, and "
            f"{percent(self.unused)} of what the server can take over the whole time goes unused."
        )


@dataclass(frozen=True)
class Recommendation:
    """The configuration to run.

    Attributes:
        calibration: Name of the calibration.
        model: Name of the model.
        objective: What was looked for.
        goodput: The workload's bounds.
        threshold: Share below the offered load that counts as starved.
        risk: Highest acceptable probability of failing.
        best: The recommended configuration as the steady twin predicts it.
        served_as: What the server is told to load: the model's Hugging Face id, or its name.
        server: Its settings under vLLM's names.
        memory: How far it is from not starting.
        neighbours: One adapter or slot more or less, by the steady twin.
        runners_up: The best of other slot counts and settings by the steady twin, best first, at most five.
        counts: Configurations that the steady twin looked at, by verdict (`Neighbour.verdict`).
        warnings: What the user should know, one sentence each.
        played: What the event twin says of the recommended configuration; None if it was not asked.
        over_time: What the peak that this is for leaves unused; None if traffic does not change over time.
    """

    calibration: str
    model: str
    objective: Objective
    goodput: Goodput
    threshold: float
    risk: float
    best: Candidate
    served_as: str
    server: ServerConfig
    memory: MemoryMargin
    neighbours: tuple[Neighbour, ...]
    runners_up: tuple[Candidate, ...]
    counts: Mapping[str, int]
    warnings: tuple[str, ...]
    played: Played | None = None
    over_time: OverTime | None = None

    @property
    def engine(self) -> str:
        """The twin that decided, ``steady`` or ``event``."""
        return "steady" if self.played is None else "event"

    @property
    def told(self) -> Candidate:
        """The recommended configuration as the twin that decided sees it."""
        return self.best if self.played is None else self.played.mean

    @property
    def serve_command(self) -> str:
        """The ``vllm serve`` line that starts the server."""
        return self.server.serve_command(self.served_as)

    @property
    def explanation(self) -> tuple[str, ...]:
        """Why this configuration, in sentences."""
        return (
            *([] if self.over_time is None else [self.over_time.words]),
            self._load_margin(),
            *self._as_played(),
            f"Memory: the KV cache holds {self.memory.kv_cache_tokens} tokens, {self.memory.spare_kv_cache_tokens} "
            f"more than vLLM needs to start; {gibibytes(self.memory.spare_bytes, 1)} of the GPU stay free.",
            *map(self._told, self.neighbours),
            f"Of {sum(self.counts.values())} configurations looked at: "
            + ", ".join(f"{spoken(verdict)} {count}" for verdict, count in sorted(self.counts.items()))
            + ".",
        )

    def _load_margin(self) -> str:
        best, starves = self.told, self.objective.goal == "throughput"
        chance = f"chance of failing {best.starving_probability:.2g}, accepted {self.risk:g}"
        if not best.limit_beyond:
            doing = "does not starve up to" if starves else "keeps its bounds up to"
            return f"It {doing} at least {best.critical_load:.3g} times this load."
        then = "" if best.limit_beyond == "none" else f"; its bottleneck is then {bottleneck(best.limit_beyond)}"
        doing = "starves at" if starves else "keeps its bounds up to"
        return f"It {doing} {best.critical_load:.3g} times this load ({chance}){then}."

    def _as_played(self) -> tuple[str, ...]:
        """What the event twin saw, and where the steady twin differs by more than the error."""
        played = self.played
        if played is None:
            return ("Nothing was played: these are the steady twin's averages.",)
        seeds = f"seeds {played.seeds[0]} to {played.seeds[-1]}" if len(played.seeds) > 1 else f"seed {played.seeds[0]}"
        refused = f"; it refused {plural(played.refused, 'larger one')}" if played.refused else ""
        off = {name: share for name, share in played.differences(self.best).items() if abs(share) > played.error}
        sentences = [
            f"The event twin played it with {seeds}: {percent(played.mean.attainment)} of the requests kept their "
            f"bounds, {percent(played.mean.served)} were served{refused}."
        ]
        if off:
            told = ", ".join(f"{_COMPARED[name]} {_more(share)}" for name, share in off.items())
            sentences.append(f"The steady twin, which takes averages, predicts otherwise: {told}.")
        return tuple(sentences)

    def _told(self, neighbour: Neighbour) -> str:
        where = (
            f"{neighbour.change.capitalize()} ({neighbour.candidate.max_cpu_loras} / {neighbour.candidate.max_loras})"
        )
        if math.isnan(neighbour.gain_tokens_per_s):
            return f"{where} does not start: {spoken(neighbour.verdict)}."
        beyond = neighbour.candidate.limit_beyond
        then = f"; bottleneck: {bottleneck(beyond)}" if beyond not in ("", "none") else ""
        return (
            f"{where}: {neighbour.gain_tokens_per_s:+.0f} tokens/s, {spoken(neighbour.verdict)}; chance of "
            f"failing {neighbour.candidate.starving_probability:.2g}{then}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the recommendation as a JSON object; what is NaN becomes null.

        ``{"model", "calibration", "objective": {"goal", "within"}, "goodput": {"ttft", …, in ms}, "attainment",
        "starvation_threshold", "risk", "recommended": {"max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs",
        "max_num_batched_tokens"}, "max_cpu_loras", "max_loras", "headroom", "client": {"ttft_s", "tpot_s", "itl_s"},
        "predicted": {Candidate}, "played": {"seeds": [numbers], "error", "refused", "differences": {name: share},
        fields of Candidate}, "margin": {"critical_load", "starving_probability", "limit_beyond", "kv_cache_tokens",
        "spare_kv_cache_tokens", "spare_bytes"}, "neighbours": [{"change", "verdict", "gain_tokens_per_s", "candidate":
        {Candidate}}], "runners_up": [{Candidate}], "looked_at": {verdict: count}, "server": {vLLM's names},
        "serve_command", "serve_environment", "explanation": [sentences], "warnings": [sentences], "engine",
        "over_time": {OverTime} or null}``, where ``{Candidate}`` has the fields of `Candidate` by the steady twin and
        ``{OverTime}`` those of `OverTime`; ``played`` is the event twin's, null if it was not asked; ``client`` is told
        by the twin that decided.
        """
        best, told, played = self.best, self.told, self.played
        content = {
            "model": self.model,
            "calibration": self.calibration,
            "objective": asdict(self.objective),
            "goodput": self.goodput.to_ms(),
            "attainment": self.goodput.attainment,
            "starvation_threshold": self.threshold,
            "risk": self.risk,
            "recommended": {name: getattr(best, name) for name in _SETTINGS},
            "max_cpu_loras": best.max_cpu_loras,
            "max_loras": best.max_loras,
            "headroom": told.critical_load,
            "client": {name: getattr(told, f"client_{name}") for name in ("ttft_s", "tpot_s", "itl_s")},
            "predicted": asdict(best),
            "played": played
            and {
                "seeds": played.seeds,
                "error": played.error,
                "refused": played.refused,
                "differences": played.differences(best),
                **asdict(played.mean),
            },
            "margin": {
                "critical_load": told.critical_load,
                "starving_probability": told.starving_probability,
                "limit_beyond": told.limit_beyond,
                **asdict(self.memory),
            },
            "neighbours": [asdict(neighbour) for neighbour in self.neighbours],
            "runners_up": [asdict(candidate) for candidate in self.runners_up],
            "looked_at": dict(self.counts),
            "server": {
                entry.name: getattr(self.server, entry.name)
                for entry in fields(self.server)
                if entry.name != "defaults"
            },
            "serve_command": self.serve_command,
            "serve_environment": environment(self.server),
            "explanation": list(self.explanation),
            "warnings": list(self.warnings),
            "engine": self.engine,
            "over_time": self.over_time and asdict(self.over_time),
        }
        plain: dict[str, Any] = _without_nan(content)
        return plain


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _more(share: float) -> str:
    """Return by how much a figure is larger than another, as people say it."""
    return f"{shown(1.0 + share)} times as much" if share >= _TIMES - 1.0 else f"{share:+.1%}"
