"""Recommendation: the configuration to run, how safe it is, what is next to it and why."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lora_capacity.display import Display, Displayed
from lora_capacity.engines import ServerConfig, environment
from lora_capacity.search.candidate import COMPARED, Candidate, MemoryMargin, Neighbour, OverTime, Played
from lora_capacity.search.objective import Objective
from lora_capacity.units import MS_PER_S
from lora_capacity.words import bottleneck, duration, gibibytes, percent, plural, shown, spoken
from lora_capacity.workload import Goodput

_TIMES = 2.0
"""Ratio from which on a difference is told as a multiple: percentages above 100 are hard to read."""

_SETTINGS = ("max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")


@dataclass(frozen=True, repr=False)
class Recommendation(Displayed):
    """The configuration to run.

    What the twin that decided predicts of it stands in attributes of its own; `told` has more, and `to_dict` all.

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
    def max_cpu_loras(self) -> int:
        """Adapters to serve, A."""
        return self.best.max_cpu_loras

    @property
    def max_loras(self) -> int:
        """Slots to reserve for them, S."""
        return self.best.max_loras

    @property
    def max_lora_rank(self) -> int:
        """Rank to reserve the slots for."""
        return self.best.max_lora_rank

    @property
    def max_num_seqs(self) -> int:
        """Most requests that run at once."""
        return self.best.max_num_seqs

    @property
    def max_num_batched_tokens(self) -> int:
        """Most tokens in a step."""
        return self.best.max_num_batched_tokens

    @property
    def throughput_tokens_per_s(self) -> float:
        """Input plus output tokens of completed requests per second."""
        return self.told.throughput_tokens_per_s

    @property
    def goodput_per_s(self) -> float:
        """Requests per second that keep the bounds."""
        return self.told.goodput_per_s

    @property
    def attainment(self) -> float:
        """Share of the arriving requests that keep the bounds."""
        return self.told.attainment

    @property
    def ttft_s(self) -> float:
        """Mean time to first token."""
        return self.told.ttft_s

    @property
    def tpot_s(self) -> float:
        """Mean over requests of their time per output token after the first."""
        return self.told.tpot_s

    @property
    def itl_s(self) -> float:
        """Mean inter-token latency."""
        return self.told.itl_s

    @property
    def headroom(self) -> float:
        """Times this load up to which it holds."""
        return self.told.critical_load

    @property
    def bottleneck(self) -> str:
        """What it runs short of where it fails, in words: ``slots``, ``KV cache``; a dash where that is nothing."""
        return spoken("" if self.told.limit_beyond == "none" else self.told.limit_beyond)

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
            f"Memory: a KV cache of {self.memory.kv_cache_tokens:,} tokens, {self.memory.spare_kv_cache_tokens:,} more "
            f"than vLLM needs to start; {gibibytes(self.memory.spare_bytes, 1)} of GPU memory free.",
            *map(self._told, self.neighbours),
            f"{sum(self.counts.values()):,} configurations searched: "
            + ", ".join(f"{count:,} {spoken(verdict)}" for verdict, count in sorted(self.counts.items()))
            + ".",
        )

    def _load_margin(self) -> str:
        best, starves = self.told, self.objective.goal == "throughput"
        chance = f"P(overload) {percent(best.starving_probability)}, {percent(self.risk)} allowed"
        if not best.limit_beyond:
            doing = "does not starve up to" if starves else "keeps its bounds up to"
            return f"It {doing} at least {best.critical_load:.3g}× this load."
        then = "" if best.limit_beyond == "none" else f"; bottleneck there: {bottleneck(best.limit_beyond)}"
        doing = "starves at" if starves else "saturates at"
        return f"It {doing} {best.critical_load:.3g}× this load ({chance}){then}."

    def _as_played(self) -> tuple[str, ...]:
        """What the event twin saw, and where the steady twin differs by more than the error."""
        played = self.played
        if played is None:
            return ("Predicted by the steady twin; not checked by the event twin.",)
        seeds = f"seeds {played.seeds[0]} to {played.seeds[-1]}" if len(played.seeds) > 1 else f"seed {played.seeds[0]}"
        refused = f"; {plural(played.refused, 'candidate')} rejected" if played.refused else ""
        off = {name: share for name, share in played.differences(self.best).items() if abs(share) > played.error}
        sentences = [
            f"Event twin, {seeds}: {percent(played.mean.attainment)} of the requests within bounds, "
            f"{percent(played.mean.served)} served{refused}."
        ]
        if off:
            told = ", ".join(f"{COMPARED[name]} {_more(share)}" for name, share in off.items())
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
            f"{where}: {neighbour.gain_tokens_per_s:+.0f} tokens/s, {spoken(neighbour.verdict)}; "
            f"P(overload) {percent(neighbour.candidate.starving_probability)}{then}."
        )

    def _display(self) -> Display:
        told, bounds_ms = self.told, self.goodput.to_ms()
        bounds = ", ".join(f"{key} {duration(bound_ms / MS_PER_S)}" for key, bound_ms in bounds_ms.items())
        return Display(
            f"{self.model}: {plural(self.max_cpu_loras, 'adapter')} (max_cpu_loras), "
            f"{plural(self.max_loras, 'slot')} (max_loras)",
            {
                "goodput": f"{shown(told.goodput_per_s)} requests/s, {percent(told.attainment)} within {bounds}",
                "throughput": f"{shown(told.throughput_tokens_per_s)} tokens/s",
                "time to first token": duration(told.ttft_s),
                "inter-token latency": duration(told.itl_s),
                "headroom": f"{shown(self.headroom)}× this load",
                "bottleneck": self.bottleneck,
                "predicted by": f"the {self.engine} twin, {self.calibration}",
            },
            command=self.serve_command,
            warnings=self.warnings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the recommendation as ``optimize --format json`` prints it; what is NaN becomes None.

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
