"""Points of a campaign: what can be measured, on which server, and how long it takes about."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, get_type_hints

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from lora_capacity.errors import InputError, check_number
from lora_capacity.schema import Count, Number, Positive, schema_of, validated

CLOSED_LOOP_WAVES = 4
"""Requests, per concurrent sequence, of the closed loop that tells a server's capacity: its middle half is measured,
which leaves a wave for the batch to fill and one for it to empty."""


@dataclass(frozen=True)
class Check:
    """Metadata of a field that a function checks and turns into what the point holds."""

    convert: Callable[[object], object]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the check that pydantic runs."""
        return core_schema.no_info_plain_validator_function(self.convert)


class Varied(Check):
    """Metadata of a field that may be a list in a grid: there is a point for each of its values."""


def _one_or_more(number: Number, *, whole: bool) -> Callable[[object], tuple[float, ...]]:
    def convert(given: object) -> tuple[float, ...]:
        values = given if isinstance(given, list) else [given]
        if not values:
            raise InputError("", given, "a number or a list of numbers")
        return tuple(check_number("", value, **dataclasses.asdict(number), integer=whole) for value in values)

    return convert


def _length_distribution(given: object) -> tuple[tuple[str, float], ...]:
    if not isinstance(given, Mapping):
        raise InputError("", given, "a law of lengths such as {mean: 100, std: 50, min: 4, max: 400}")
    return tuple(sorted((str(name), float(check_number(str(name), given[name]))) for name in given))


_counts = _one_or_more(Number(minimum=1), whole=True)
_positives = _one_or_more(Number(minimum=0, exclusive=True), whole=False)
VariedCount = Annotated[int, Varied(_counts)]
VariedNumber = Annotated[float, Varied(_positives)]
Lengths = Annotated[tuple[tuple[str, float], ...], Check(_length_distribution)]


@dataclass(frozen=True)
class Speed:
    """About how fast a server is: only for telling how long a campaign will take.

    Attributes:
        start_s: Start of a server, seconds.
        step_s: Step of an empty batch, seconds.
        sequence_s: What each sequence adds to a decode step, seconds.
        request_s: What each request adds outside steps, seconds.
        prompt_token_s: Prefill of a token, seconds.
        load_s: Load of an adapter, seconds.
    """

    start_s: float
    step_s: float
    sequence_s: float
    request_s: float
    prompt_token_s: float
    load_s: float


SPEEDS = {
    "gpu": Speed(110.0, 0.013, 0.0001, 0.001, 0.00005, 0.08),
    "cpu": Speed(28.0, 0.006, 0.0003, 0.005, 0.00002, 0.03),
}
"""By device: seen on an H100 with a model of 8 billion parameters, and on two cores of a CPU with one of 4 layers."""

_ADAPTERS_DOUBLE = 40.0
"""Rank plus adapters of a batch at which LoRA about doubles what a sequence adds to a step, on either device."""


@dataclass(frozen=True)
class Point:
    """One thing to measure; a grid of a campaign holds many.

    Attributes:
        ID: Format of `id`.
        POSSIBLE: What a combination of a grid must fulfil to be a point.
        REPEATED: Whether it is measured as often as the campaign repeats.
    """

    ID: ClassVar[str]
    POSSIBLE: ClassVar[str] = ""
    REPEATED: ClassVar[bool] = True

    @classmethod
    def of_grid(cls, where: str, grid: object) -> list[Self]:
        """Return the points of a grid: every combination of its lists that makes sense.

        Args:
            where: Name of the grid, for messages.
            grid: Fields by name; those that are `Varied` may be lists.

        Raises:
            InputError: If a key or value is not allowed, or no combination makes sense.
        """
        given = validated(schema_of(cls), grid, where)  # type: ignore[arg-type]  # mypy: `type[Self]` is unhashable
        hints = get_type_hints(cls, include_extras=True)
        options = []
        for entry in dataclasses.fields(cls):
            value = getattr(given, entry.name)
            varied = any(isinstance(each, Varied) for each in getattr(hints[entry.name], "__metadata__", ()))
            options.append(value if varied else (value,))
        points = [point for values in itertools.product(*options) if (point := cls(*values)).possible]
        if not points:
            raise InputError(where, grid, f"at least one combination with {cls.POSSIBLE}")
        return points

    @property
    def id(self) -> str:
        """Name of the point, the same in every campaign that measures it."""
        return self.ID.format(**vars(self))

    @property
    def possible(self) -> bool:
        """Whether such a point can be measured at all; see ``POSSIBLE``."""
        return True

    @property
    def server(self) -> tuple[int, int, int | None]:
        """``max_loras``, ``max_lora_rank`` and ``max_cpu_loras`` of its server; None: of the last, any will do."""
        slots, rank, cpu = (getattr(self, name, None) for name in ("max_loras", "max_lora_rank", "max_cpu_loras"))
        return (slots, rank or 0, cpu) if slots else (0, 0, 0)

    @property
    def adapters_by_rank(self) -> Counter[int]:
        """How many adapters of each rank it needs."""
        return Counter()

    def once_s(self, speed: Speed, max_num_seqs: int) -> float:
        """Return about how long one measurement of it takes, beside the start of its server, seconds."""
        return 0.0


@dataclass(frozen=True)
class KvCapacity(Point):
    """Start of a server with so many slots of a rank, which tells its KV cache."""

    ID = "start/slots{max_loras}-rank{max_lora_rank}"
    max_loras: VariedCount
    max_lora_rank: VariedCount


@dataclass(frozen=True)
class Decode(Point):
    """Batch of the base model in decode."""

    ID = "decode/batch{batch_size}"
    batch_size: VariedCount
    output_tokens: Count

    def once_s(self, speed: Speed, max_num_seqs: int) -> float:
        """Return a step a token, and the requests."""
        step_s = speed.step_s + speed.sequence_s * self.batch_size
        return self.output_tokens * step_s + self.batch_size * speed.request_s


@dataclass(frozen=True)
class Prefill(Point):
    """Prompts of the base model with an output of one token, ``batch_size`` at a time."""

    ID = "prefill/batch{batch_size}-tokens{input_tokens}"
    batch_size: VariedCount
    input_tokens: VariedCount
    num_prompts: Count

    def once_s(self, speed: Speed, max_num_seqs: int) -> float:
        """Return a prefill a prompt, and its share of a step."""
        prompt_s = speed.request_s + self.input_tokens * speed.prompt_token_s + speed.step_s / self.batch_size
        return self.num_prompts * prompt_s


@dataclass(frozen=True)
class AdapterBatch(Point):
    """Batch of so many different adapters in decode."""

    ID = "adapters/slots{max_loras}-rank{max_lora_rank}/adapters{served_adapters}-batch{batch_size}"
    POSSIBLE = "adapters <= slots and batch"
    max_loras: VariedCount
    max_lora_rank: VariedCount
    served_adapters: VariedCount
    batch_size: VariedCount
    output_tokens: Count

    @property
    def possible(self) -> bool:
        """Whether all adapters fit into slots and batch."""
        return self.served_adapters <= min(self.max_loras, self.batch_size)

    @property
    def adapters_by_rank(self) -> Counter[int]:
        """The adapters of the batch, of the slots' rank."""
        return Counter({self.max_lora_rank: self.served_adapters})

    def once_s(self, speed: Speed, max_num_seqs: int) -> float:
        """Return the time of a batch without adapters, with a wider step."""
        slower = 1.0 + (self.max_lora_rank + self.served_adapters) / _ADAPTERS_DOUBLE
        step_s = speed.step_s + slower * speed.sequence_s * self.batch_size
        return self.output_tokens * step_s + self.batch_size * speed.request_s


@dataclass(frozen=True)
class Loading(Point):
    """Adapters of a rank asked one after the other, ``rounds`` times, on a server of one slot."""

    ID = "loading/rank{max_lora_rank}/adapter{adapter_rank}"
    POSSIBLE = "adapter_rank <= max_lora_rank"
    max_lora_rank: VariedCount
    adapter_rank: VariedCount
    adapters: Count
    rounds: Count

    @property
    def possible(self) -> bool:
        """Whether the adapters fit into the slot."""
        return self.adapter_rank <= self.max_lora_rank

    @property
    def server(self) -> tuple[int, int, int | None]:
        """A server of one slot, with half of the adapters in host memory.

        Asked round-robin, none of the adapters is still there when it is asked again: vLLM evicts the least recently
        used one (``LRUCacheLoRAModelManager`` in ``lora/model_manager.py``).
        """
        return 1, self.max_lora_rank, max(self.adapters // 2, 1)

    @property
    def adapters_by_rank(self) -> Counter[int]:
        """All adapters, of their rank."""
        return Counter({self.adapter_rank: self.adapters})

    def once_s(self, speed: Speed, max_num_seqs: int) -> float:
        """Return a load a request; a round more warms up."""
        return self.adapters * (self.rounds + 1) * speed.load_s


@dataclass(frozen=True)
class ServingRun(Point):
    """Traffic at a share of the server's capacity for the same traffic.

    Attributes:
        input_tokens: Distribution of the prompt lengths, as in a workload file.
        output_tokens: Distribution of the output lengths.
        max_loras: Slots.
        max_cpu_loras: Adapters served.
        max_lora_rank: Rank of the slots.
        load: Requests per second relative to what a closed loop of ``max_num_seqs`` requests gets answered.
        ranks: Ranks assigned round-robin to the adapters.
        rate_shares: Relative rates, assigned likewise.
        horizon_s: Length of the run in seconds.
    """

    ID = "serving/slots{max_loras}-rank{max_lora_rank}/adapters{max_cpu_loras}-load{load:g}"
    POSSIBLE = "slots <= adapters and ranks <= max_lora_rank"
    REPEATED = False
    input_tokens: Lengths
    output_tokens: Lengths
    max_loras: VariedCount
    max_cpu_loras: VariedCount
    max_lora_rank: VariedCount
    load: VariedNumber
    ranks: Annotated[tuple[int, ...], Check(_counts)]
    rate_shares: Annotated[tuple[float, ...], Check(_positives)]
    horizon_s: Positive

    @property
    def possible(self) -> bool:
        """Whether no slot is for nobody, and every adapter fits into one."""
        return self.max_loras <= self.max_cpu_loras and max(self.ranks) <= self.max_lora_rank

    @property
    def adapter_ranks(self) -> list[int]:
        """Rank of each adapter."""
        return [self.ranks[i % len(self.ranks)] for i in range(self.max_cpu_loras)]

    @property
    def adapters_by_rank(self) -> Counter[int]:
        """The adapters, of their ranks."""
        return Counter(self.adapter_ranks)

    def once_s(self, speed: Speed, max_num_seqs: int) -> float:
        """Return the horizon, and the closed loop that tells the capacity."""
        wave_s = (speed.step_s + 2.0 * speed.sequence_s * max_num_seqs) * dict(self.output_tokens)["mean"]
        return self.horizon_s + CLOSED_LOOP_WAVES * (wave_s + max_num_seqs * speed.request_s)
