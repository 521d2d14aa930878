"""Failures of a server, told in one line."""

from lora_capacity.errors import LoraCapacityError
from lora_capacity_profiling.startlog import StartOutcome


class ServerError(LoraCapacityError):
    """A server did not start, died, or does not answer as a vLLM server does.

    Args:
        message: What happened and what to do about it, one line.
        outcome: What became of the start: ``failed``, or why the engine refused (``no_kv_cache``, ``oom``).
        log_tail: Last lines of the server's log, where it has one.
    """

    def __init__(
        self, message: str, *, outcome: StartOutcome = StartOutcome.FAILED, log_tail: tuple[str, ...] = ()
    ) -> None:
        self.outcome, self.log_tail = outcome, log_tail
        super().__init__(" ".join(message.split()))
