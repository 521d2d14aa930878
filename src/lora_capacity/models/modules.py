"""Layers of a model as sizes: linear modules, what a layer keeps in the KV cache, and how both are split over GPUs."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import PlainValidator

from lora_capacity.errors import InputError, check_number
from lora_capacity.schema import Count, Document, NotNegative, Number

D = TypeVar("D", bound=Document)

_EXPERT_NAMES = frozenset({"experts", "gate_proj", "up_proj", "down_proj", "gate_up_proj"})
"""What adapters call the layers of experts."""

Natural = Annotated[int, Number(minimum=0)]
"""A whole number from 0 on."""


def tuple_of(read: Callable[[Any], Any]) -> PlainValidator:
    """Return the check of a field that holds a tuple, a list in JSON, each item read by a function."""

    def read_all(content: Any) -> tuple[Any, ...]:
        if not isinstance(content, list | tuple):
            raise InputError("", type(content).__name__, "a list")
        return tuple(map(read, content))

    return PlainValidator(read_all, json_schema_input_type=list[Any])


def document(cls: type[D]) -> Callable[[Any], D]:
    """Return the function that makes a document of what a file holds of it."""
    return lambda content: content if isinstance(content, cls) else cls.from_json(content)


def natural(value: Any) -> int:
    """Return a whole number from 0 on."""
    return int(check_number("", value, minimum=0, integer=True))


def text(value: Any) -> str:
    """Return a text."""
    if not isinstance(value, str):
        raise InputError("", value, "text")
    return value


@dataclass(frozen=True)
class LinearModule(Document):
    """A linear layer as vLLM runs it: one input, one or more fused outputs.

    Attributes:
        name: vLLM's name of the layer.
        input_size: Width of its input.
        output_sizes: Width of each fused output.
        kind: What it belongs to: ``attention``, ``mlp`` or ``experts``.
        parts: Names of the modules that checkpoints and adapters have in its place; empty: its own. With one name for
            several outputs these share one adapter, otherwise each output has its own.
        split: How tensor parallelism divides it: its outputs (``column``), its input (``row``), or not (``whole``).
        kv_heads: Heads of the outputs after the first, which are not divided below one a GPU; 0: all divide evenly.
        bias: Whether it has biases.
        experts: Copies of it, one an expert; 0: it is no expert.
        bits: Bits of a stored weight, scales of groups included; 0: those of the model's own type.
        bytes_per_output: Bytes of scales for each output.
        input_multiple: The stored matrix is padded to a multiple of so many inputs on each GPU.
        output_multiple: The same of each output.
        adapted: Whether vLLM reserves adapter slots for it.
    """

    name: str
    input_size: Count
    output_sizes: Annotated[tuple[int, ...], tuple_of(natural)]
    kind: Literal["attention", "mlp", "experts"] = "mlp"
    parts: Annotated[tuple[str, ...], tuple_of(text)] = ()
    split: Literal["column", "row", "whole"] = "column"
    kv_heads: Natural = 0
    bias: bool = False
    experts: Natural = 0
    bits: NotNegative = 0.0
    bytes_per_output: NotNegative = 0.0
    input_multiple: Count = 1
    output_multiple: Count = 1
    adapted: bool = True

    where: ClassVar[str] = "module"

    @property
    def adapter_names(self) -> frozenset[str]:
        """What adapters call it, or its parts."""
        return _EXPERT_NAMES if self.experts else frozenset((self.name, *self.parts))

    def local_input(self, tensor_parallel_size: int) -> int:
        """Return the width of the input that one GPU holds weights for."""
        return _divided(self.input_size, tensor_parallel_size, self.name) if self.split == "row" else self.input_size

    def local_outputs(self, tensor_parallel_size: int) -> tuple[int, ...]:
        """Return the width of each output that one GPU holds weights for."""
        if self.split != "column":
            return self.output_sizes
        return tuple(
            _divided(size, min(tensor_parallel_size, self.kv_heads), self.name)
            if index and self.kv_heads
            else _divided(size, tensor_parallel_size, self.name)
            for index, size in enumerate(self.output_sizes)
        )

    def weight_bytes(self, tensor_parallel_size: int, dtype_bytes: int) -> int:
        """Return the bytes of its matrix, or of its experts' matrices, on one GPU."""
        outputs = sum(_padded(size, self.output_multiple) for size in self.local_outputs(tensor_parallel_size))
        inputs = _padded(self.local_input(tensor_parallel_size), self.input_multiple)
        matrix = round(inputs * outputs * (self.bits or 8 * dtype_bytes) / 8 + outputs * self.bytes_per_output)
        return matrix * max(self.experts, 1)

    def bias_bytes(self, tensor_parallel_size: int, dtype_bytes: int) -> int:
        """Return the bytes of its biases on one GPU."""
        return sum(self.local_outputs(tensor_parallel_size)) * dtype_bytes * max(self.experts, 1) if self.bias else 0

    def adapter_elements(
        self, tensor_parallel_size: int, *, fully_sharded_loras: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the elements of the A and of the B matrices of one slot on one GPU, for each unit of rank.

        A of a column-parallel and B of a row-parallel layer stand whole on every GPU, the other matrix is divided as
        the layer is; with ``--fully-sharded-loras`` those are divided too, A by its rank.

        Source: ``create_lora_weights`` in vLLM 0.32.0, ``lora/layers/base_linear.py``, ``column_parallel_linear.py``
        and ``fused_moe.py``.
        """
        outputs = self.local_outputs(tensor_parallel_size)
        if len(self.parts) == 1:
            outputs = (sum(outputs),)
        inputs = self.local_input(tensor_parallel_size)
        if fully_sharded_loras and self.split == "column":
            inputs = _divided(inputs, tensor_parallel_size, self.name)
        if fully_sharded_loras and self.split == "row":
            outputs = tuple(_divided(size, tensor_parallel_size, self.name) for size in outputs)
        copies = max(self.experts, 1)
        return (copies * inputs,) * len(outputs), tuple(copies * size for size in outputs)

    def saved_elements(self, names: Collection[str] = ()) -> int:
        """Return the elements that an adapter has for it in its file and in host memory, for each unit of rank.

        Every part that is adapted has an A matrix as wide as the input and a B matrix as wide as its own output, whole;
        where there are fewer parts than outputs, the first part has those in excess.

        Args:
            names: Modules that the adapter adapts, of which experts are all adapted or none; empty: all.

        Source: ``pack`` and ``pack_moe`` in vLLM 0.32.0, ``lora/lora_weights.py``.
        """
        parts = self.parts or (self.name,) * (len(self.output_sizes) if self.experts else 1)
        excess = len(self.output_sizes) - len(parts) + 1
        outputs = (sum(self.output_sizes[:excess]), *self.output_sizes[excess:])
        whole = not names or self.name in names or (self.experts and not self.adapter_names.isdisjoint(names))
        adapted = [size for part, size in zip(parts, outputs, strict=True) if whole or part in names]
        return max(self.experts, 1) * sum(self.input_size + size for size in adapted)


@dataclass(frozen=True)
class LayerCache(Document):
    """What a layer keeps of a sequence.

    Attributes:
        kind: ``full``: keys and values of every token; ``sliding``: those of a window; ``latent``: a compressed vector
            of every token, whole on every GPU; ``state``: a state of fixed size.
        elements: Elements kept of a token; of a ``state``, those in the model's own type.
        heads: Key and value heads, over which it is divided down to one a GPU; 0: it is not divided by heads.
        window: Tokens of the window, where it has one.
        state_elements: Elements of a ``state`` in a type of their own.
        state_element_bytes: Bytes of such an element.
    """

    kind: Literal["full", "sliding", "latent", "state"]
    elements: Count
    heads: Natural = 0
    window: Natural = 0
    state_elements: Natural = 0
    state_element_bytes: Count = 2

    where: ClassVar[str] = "cache"

    def local_elements(self, tensor_parallel_size: int) -> int:
        """Return the elements of a token, or of the state in the model's own type, on one GPU."""
        if self.kind == "latent":
            return self.elements
        return _divided(self.elements, min(tensor_parallel_size, self.heads or tensor_parallel_size), "KV cache")

    def state_bytes(self, tensor_parallel_size: int, dtype_bytes: int) -> int:
        """Return the bytes of a sequence's state on one GPU."""
        special = _divided(self.state_elements, tensor_parallel_size, "state") * self.state_element_bytes
        return self.local_elements(tensor_parallel_size) * dtype_bytes + special


@dataclass(frozen=True)
class Block(Document):
    """A decoder layer.

    Attributes:
        modules: Its linear layers, in order of creation.
        vectors: Elements of its norms and other small parameters.
        cache: What it keeps of a sequence; None: nothing.
        sharded_vectors: Those of the small parameters that are divided over GPUs; the others are whole on each.
    """

    modules: Annotated[tuple[LinearModule, ...], tuple_of(document(LinearModule))]
    vectors: Natural
    cache: LayerCache | None = None
    sharded_vectors: Natural = 0

    where: ClassVar[str] = "block"

    def local_vectors(self, tensor_parallel_size: int) -> int:
        """Return the elements of small parameters on one GPU."""
        sharded = _divided(self.sharded_vectors, tensor_parallel_size, "small parameters")
        return self.vectors - self.sharded_vectors + sharded


def _divided(size: int, gpus: int, name: str) -> int:
    if size % gpus:
        raise InputError("tensor_parallel_size", gpus, f"a divisor of {size}, the width of {name}")
    return size // gpus


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
