"""GPUs: what of their data sheets decides how many adapters a server can hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from lora_capacity.schema import Count, check_fields, fields_of_json


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: Name of the GPU.
        memory_bytes: Memory that the driver reports as its total, bytes.
    """

    name: str
    memory_bytes: Count

    def __post_init__(self) -> None:
        check_fields(self, "gpu")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild what :meth:`to_json` wrote.

        Raises:
            InputError: If a key is unknown or missing, or a value is not allowed.
        """
        return cls(**fields_of_json(cls, content, "gpu"))
