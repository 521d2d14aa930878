"""What a vLLM server's log tells of its start: whether it came up, why not, and what memory went where."""

import enum
import re
from dataclasses import dataclass
from typing import Self


class StartOutcome(enum.StrEnum):
    """What became of a start, by the names that the profile's tables use."""

    OK = "ok"
    NO_KV_CACHE = "no_kv_cache"
    """The engine refuses: the KV cache left is smaller than one request of ``max_model_len``."""
    OOM = "oom"
    """The server ran out of memory while it started."""
    FAILED = "failed"
    """Anything else."""

    @property
    def refused(self) -> bool:
        """Whether it failed for want of memory, which is a measurement of what the server can take."""
        return self in (StartOutcome.NO_KV_CACHE, StartOutcome.OOM)


# Source of all patterns: the messages in vLLM 0.8.5 and 0.32.0 (v1/core/kv_cache_utils.py, v1/worker/, worker/
# cpu_worker.py), and of PyTorch's allocators. "Free memory ... is less than desired" is no outcome of its own: there
# other processes hold the memory, which says nothing of what the server can take.
_NO_KV_CACHE = (
    r"No available memory for the cache blocks",
    r"To serve at least one request with the model'?s'?s? max seq len",
    r"is larger than the maximum number of tokens that can be stored in KV cache",
)
_OOM = (
    r"\bout of memory\b",
    r"OutOfMemoryError",
    r"not enough (?:GPU )?memory",
    r"[Cc]an(?:no|')t allocate memory",
    r"\bMemoryError\b",
    r"died unexpectedly \(exit code: -9\)",
)
_CAUSE = re.compile(
    r"(?:^|[\]):] )((?:[\w.]+(?:Error|Exception)|(?:\S+: )?error): .+|Worker proc \S+ died unexpectedly.+)$"
)
_CONSEQUENCES = ("initialization failed", "EngineCore failed to start", "EngineDeadError", "add_lora method failed")
_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:(?:INFO|WARNING|ERROR|DEBUG) [-\d]+ [:.\d]+ \[[^\]]*\] )?")

_KILLED_CODES = (137, -9)  # by SIGKILL, as a shell and as Python report it


@dataclass(frozen=True)
class StartReport:
    """What the log of a start says.

    Attributes:
        outcome: What became of it.
        reason: The line that says why not; empty where it came up.
        kv_cache_tokens: Tokens that the KV cache holds; None where the log does not say.
        model_load_gib: Memory of weights and adapter slots, GiB; None likewise.
        cuda_graph_gib: Memory of the CUDA graphs, GiB; None likewise.
    """

    outcome: StartOutcome
    reason: str = ""
    kv_cache_tokens: int | None = None
    model_load_gib: float | None = None
    cuda_graph_gib: float | None = None

    @classmethod
    def from_log(cls, text: str, *, started: bool, exit_code: int | None = None) -> Self:
        """Read the log of a server.

        Args:
            text: The log.
            started: Whether the server answers.
            exit_code: Exit code of the server, where it ended: a process that was killed from outside most often was
                so by the kernel, for want of memory.
        """
        outcome, reason = (StartOutcome.OK, "") if started else _why(text.splitlines(), exit_code)
        tokens = re.search(r"KV cache size: ([\d,]+) tokens", text)
        model = re.search(r"Model loading took ([\d.]+) GiB", text)
        graphs = re.search(r"Graph capturing finished in [\d.]+ secs, took (-?[\d.]+) GiB", text)
        return cls(
            outcome,
            reason,
            int(tokens[1].replace(",", "")) if tokens else None,
            float(model[1]) if model else None,
            float(graphs[1]) if graphs else None,
        )


def _why(lines: list[str], exit_code: int | None) -> tuple[StartOutcome, str]:
    for outcome, patterns in ((StartOutcome.NO_KV_CACHE, _NO_KV_CACHE), (StartOutcome.OOM, _OOM)):
        found = re.compile("|".join(patterns))
        for line in lines:
            if found.search(line):
                return outcome, plain(line)
    if exit_code in _KILLED_CODES:
        return StartOutcome.OOM, "killed from outside, as the kernel does when memory runs out"
    causes = [match[1] for line in lines if (match := _CAUSE.search(line))]
    # The first error is the cause, those after it report that it happened.
    roots = [cause for cause in causes if not any(text in cause for text in _CONSEQUENCES)]
    last = [plain(line) for line in lines if line.strip()][-1:]
    return StartOutcome.FAILED, (roots or causes or last or ["it wrote no log"])[0]


def plain(line: str) -> str:
    """Return a line of vLLM's log without process, time and place."""
    return _PREFIX.sub("", line).strip()
