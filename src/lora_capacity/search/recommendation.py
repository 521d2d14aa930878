"""Recommendation: the configuration to run, how safe it is, what is next to it and why."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from lora_capacity.engines import ServerConfig
from lora_capacity.search.objective import Columns, Objective
from lora_capacity.words import bottleneck, gibibytes, spoken

_COMPARED = ("throughput_tokens_per_s", "itl_s", "ttft_s", "mean_running", "kv_usage")


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
        itl_s: Mean inter-token latency.
        ttft_s: Mean time to first token.
        mean_running: Requests in the batch.
        mean_waiting: Requests waiting.
        active_adapters: Different adapters in the batch.
        kv_usage: Share of the KV cache in use.
        loads_per_s: Adapter loads into GPU slots per second.
        limit: Bottleneck at the offered load (`Bottleneck` label; ``none`` while it keeps up).
        limit_beyond: Bottleneck at the load at which it starves; empty if no load tried starves it.
        critical_load: Times the offered load at which it starves; the highest load tried if that does not starve it.
        starving_probability: Chance that it starves, given the calibration's error.
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
    itl_s: float
    ttft_s: float
    mean_running: float
    mean_waiting: float
    active_adapters: float
    kv_usage: float
    loads_per_s: float
    limit: str
    limit_beyond: str
    critical_load: float
    starving_probability: float
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
        verdict: ``acceptable``, ``risky``, ``starved``, ``too_slow`` (beyond a latency bound), ``no_kv_cache`` or
            ``oom``.
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
class SecondOpinion:
    """What the steady twin says where the event twin has decided.

    Attributes:
        of_best: The recommended configuration as the steady twin predicts it.
        chosen: The configuration that the steady twin would take, as it predicts it.
        chosen_played: The same as the event twin simulates it.
        seeds: How often the event twin simulated each configuration at each load.
        spread: Standard deviation over seeds of the logarithm of the throughput, of configurations with the
            recommended slots: with the calibration's error what the margin to starvation is held against.
    """

    of_best: Candidate
    chosen: Candidate
    chosen_played: Candidate
    seeds: int
    spread: float

    def differences(self, best: Candidate) -> dict[str, float]:
        """Return how far the steady twin's figures of the recommended configuration lie from the event twin's.

        Args:
            best: The recommended configuration as the event twin simulates it.

        Returns:
            Shares of the event twin's figures, by name; positive where the steady twin says more.
        """
        pairs = {name: (getattr(self.of_best, name), getattr(best, name)) for name in _COMPARED}
        return {name: steady / event - 1.0 if event else math.nan for name, (steady, event) in pairs.items()}


@dataclass(frozen=True)
class Recommendation:
    """The configuration to run.

    Attributes:
        calibration: Name of the calibration.
        model: Name of the model.
        objective: What was looked for.
        threshold: Share below the offered load that counts as starved.
        risk: Highest acceptable probability of starving.
        best: The recommended configuration.
        server: Its settings under vLLM's names; ``server.serve_command(model)`` is the command line.
        memory: How far it is from not starting.
        neighbours: One adapter or slot more or less.
        runners_up: The best of other slot counts and settings, best first, at most five.
        counts: Configurations looked at, by verdict (`Neighbour.verdict`).
        warnings: What the user should know, one sentence each.
        engine: The twin whose predictions these are, ``steady`` or ``event``.
        second_opinion: What the steady twin says, if the event twin has decided.
    """

    calibration: str
    model: str
    objective: Objective
    threshold: float
    risk: float
    best: Candidate
    server: ServerConfig
    memory: MemoryMargin
    neighbours: tuple[Neighbour, ...]
    runners_up: tuple[Candidate, ...]
    counts: Mapping[str, int]
    warnings: tuple[str, ...]
    engine: str = "steady"
    second_opinion: SecondOpinion | None = None

    @property
    def explanation(self) -> tuple[str, ...]:
        """Why this configuration, in sentences."""
        return (
            *self._load_margin(),
            f"Memory: the KV cache holds {self.memory.kv_cache_tokens} tokens, {self.memory.spare_kv_cache_tokens} "
            f"more than vLLM needs to start; {gibibytes(self.memory.spare_bytes, 1)} of the GPU stay free.",
            *map(self._told, self.neighbours),
            f"Of {sum(self.counts.values())} configurations looked at: "
            + ", ".join(f"{spoken(verdict)} {count}" for verdict, count in sorted(self.counts.items()))
            + ".",
            *self._compared(),
        )

    def _compared(self) -> tuple[str, ...]:
        """Which twin said what."""
        other, best = self.second_opinion, self.best
        if other is None:
            return ()
        off = other.differences(best)
        told = (
            f"The event twin decided, with {other.seeds} seeds that differ by {other.spread:.1%} in throughput. Of "
            f"the same configuration the steady twin predicts {off['throughput_tokens_per_s']:+.1%} throughput, "
            f"{off['itl_s']:+.1%} inter-token latency and {off['ttft_s']:+.1%} time to first token"
        )
        taken = (other.chosen.max_cpu_loras, other.chosen.max_loras)
        if taken == (best.max_cpu_loras, best.max_loras):
            return (f"{told}, and would take it too.",)
        simulated = other.chosen_played
        return (
            f"{told}.",
            f"The steady twin would take {taken[0]} adapters with {taken[1]} slots for "
            f"{other.chosen.throughput_tokens_per_s:.0f} tokens/s; simulated, it completes "
            f"{simulated.throughput_tokens_per_s:.0f} of {simulated.offered_tokens_per_s:.0f} tokens/s, and its chance "
            f"of starving is {simulated.starving_probability:.2g}.",
        )

    def _load_margin(self) -> tuple[str, ...]:
        best = self.best
        chance = f"chance {best.starving_probability:.2g}, accepted {self.risk:g}"
        if not best.limit_beyond:
            return (f"It keeps up with at least {best.critical_load:.3g} times the offered load.",)
        return (
            f"It starves at {best.critical_load:.3g} times the offered load ({chance}); its bottleneck is then "
            f"{bottleneck(best.limit_beyond)}.",
        )

    def _told(self, neighbour: Neighbour) -> str:
        where = (
            f"{neighbour.change.capitalize()} ({neighbour.candidate.max_cpu_loras} / {neighbour.candidate.max_loras})"
        )
        if math.isnan(neighbour.gain_tokens_per_s):
            return f"{where} does not start: {spoken(neighbour.verdict)}."
        beyond = neighbour.candidate.limit_beyond
        then = f"; bottleneck: {bottleneck(beyond)}" if beyond else ""
        return (
            f"{where}: {neighbour.gain_tokens_per_s:+.0f} tokens/s, {spoken(neighbour.verdict)}; chance of "
            f"starving {neighbour.candidate.starving_probability:.2g}{then}."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the recommendation as a JSON object; what is NaN becomes null.

        ``{"model", "calibration", "objective": {"goal", "within", "max_itl_s", "max_ttft_s"}, "starvation_threshold",
        "risk", "max_cpu_loras", "max_loras", "predicted": {Candidate}, "margin": {"critical_load",
        "starving_probability", "limit_beyond", "kv_cache_tokens", "spare_kv_cache_tokens", "spare_bytes"},
        "neighbours": [{"change", "verdict", "gain_tokens_per_s", "candidate": {Candidate}}], "runners_up":
        [{Candidate}], "looked_at": {verdict: count}, "server": {vLLM's names}, "serve_command", "explanation":
        [sentences], "warnings": [sentences], "engine", "second_opinion"}``, where ``{Candidate}`` has the fields of
        `Candidate`; ``second_opinion`` is null or ``{"of_best": {Candidate}, "chosen": {Candidate}, "chosen_played":
        {Candidate}, "seeds", "spread", "differences": {name: share}}``.
        """
        best = self.best
        content = {
            "model": self.model,
            "calibration": self.calibration,
            "objective": asdict(self.objective),
            "starvation_threshold": self.threshold,
            "risk": self.risk,
            "max_cpu_loras": best.max_cpu_loras,
            "max_loras": best.max_loras,
            "predicted": asdict(best),
            "margin": {
                "critical_load": best.critical_load,
                "starving_probability": best.starving_probability,
                "limit_beyond": best.limit_beyond,
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
            "serve_command": self.server.serve_command(self.model),
            "explanation": list(self.explanation),
            "warnings": list(self.warnings),
            "engine": self.engine,
            "second_opinion": self.second_opinion
            and asdict(self.second_opinion) | {"differences": self.second_opinion.differences(best)},
        }
        plain: dict[str, Any] = _without_nan(content)
        return plain


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
