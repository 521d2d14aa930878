"""Speeds of servers as people report them: a load, and how long a token took."""

import math
from dataclasses import dataclass
from pathlib import Path

from lora_capacity.hardware import Processor, find_gpu
from lora_capacity.measurements.startups import Startup, read_servers
from lora_capacity.tables import Column

_TEXT, _NUMBER = Column("text", required=False, blank=True), Column(required=False, blank=True)
_COLUMNS = {
    "id": Column("text"),
    **dict.fromkeys(("vllm_version", "engine", "gpu"), _TEXT),
    "num_gpus_tp": _NUMBER,
    **dict.fromkeys(("model", "quantization", "enable_lora"), _TEXT),
    **dict.fromkeys(("max_loras", "max_lora_rank", "adapters_in_use", "max_num_seqs"), _NUMBER),
    **dict.fromkeys(("concurrency", "request_rate", "input_len", "output_len"), _NUMBER),
    **dict.fromkeys(("ttft_ms", "tpot_ms", "itl_ms", "output_tok_s", "req_s"), _NUMBER),
}
SPEED_COLUMNS = tuple(_COLUMNS)
"""Columns of a table of speeds; what is not known stays blank."""


@dataclass(frozen=True)
class Speed:
    """One measured speed; NaN: not told.

    Attributes:
        server: The server, as a start of it would be told.
        gpus_told: Whether the number of GPUs is known.
        adapters: Different adapters that requests ask for.
        concurrency: Requests in flight.
        request_rate_per_s: Requests per second that arrive.
        input_tokens: Mean prompt.
        output_tokens: Mean answer.
        measured_s: Time per output token of a request.
    """

    server: Startup
    gpus_told: bool
    adapters: float
    concurrency: float
    request_rate_per_s: float
    input_tokens: float
    output_tokens: float
    measured_s: float

    @property
    def id(self) -> str:
        """Its name in the table."""
        return self.server.id

    @property
    def tells_load(self) -> bool:
        """Whether it is known how many requests were in flight."""
        return not (math.isnan(self.concurrency) and math.isnan(self.request_rate_per_s))

    @property
    def processor(self) -> Processor:
        """The GPU.

        Raises:
            InputError: If the catalogue does not know it.
        """
        return find_gpu(self.server.gpu_kind)


def read_speeds(facts: str | Path, models: str | Path | None = None) -> list[Speed]:
    """Read a table of speeds.

    The time per token is ``itl_ms``, else ``tpot_ms``, else requests in flight over tokens per second.

    Args:
        facts: CSV file, one speed a row, with columns of `SPEED_COLUMNS`; of these only ``id`` must be there.
        models: As of `read_startups`.

    Raises:
        InputError: If a file cannot be read, or a cell does not hold what it should.
    """
    found = []
    for row, server in read_servers(facts, models, _COLUMNS):
        by_throughput = row["concurrency"] / row["output_tok_s"] if row["output_tok_s"] > 0 else math.nan
        told = (row["itl_ms"] / 1e3, row["tpot_ms"] / 1e3, by_throughput)
        found.append(
            Speed(
                server=server,
                gpus_told=not math.isnan(row["num_gpus_tp"]),
                adapters=row["adapters_in_use"],
                concurrency=row["concurrency"],
                request_rate_per_s=row["request_rate"],
                input_tokens=row["input_len"],
                output_tokens=row["output_len"],
                measured_s=next((each for each in told if not math.isnan(each)), math.nan),
            )
        )
    return found
