"""Schemas of what users write, in files and in settings: keys, kinds and ranges, one sentence for each fault.

Built on pydantic, which walks nested content and gives the JSON schema; the sentences are those of `InputError`.
Metadata of an annotation says what a field takes: ``Annotated[int, Number(minimum=1)]``.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_type_hints

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, create_model
from pydantic import model_validator as _model_validator
from pydantic_core import CoreSchema, core_schema

from lora_capacity.errors import MISSING, InputError, check_keys, check_number, nearest_hint

_LONGEST_TEXT = 80
"""Characters of a text that a message shows: about a line of a terminal."""

M = TypeVar("M", bound=BaseModel)


@dataclasses.dataclass(frozen=True)
class Number:
    """Metadata of a field that takes a finite number within bounds; a whole one where the annotation is ``int``.

    Attributes:
        minimum: Smallest allowed value, if any.
        maximum: Largest allowed value, if any.
        exclusive: Whether ``minimum`` itself is refused.
    """

    minimum: float | None = None
    maximum: float | None = None
    exclusive: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the check that pydantic runs."""
        check = functools.partial(check_number, "", **dataclasses.asdict(self), integer=source is int)
        return core_schema.no_info_plain_validator_function(check, metadata={"whole": source is int})

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return what the JSON schema says of the field."""
        kind = "integer" if core["metadata"]["whole"] else "number"
        bounds = {"exclusiveMinimum" if self.exclusive else "minimum": self.minimum, "maximum": self.maximum}
        return {"type": kind} | {name: bound for name, bound in bounds.items() if bound is not None}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Metadata of a field that takes a list of at least one number; it becomes a float64 array ``[n]``.

    Attributes:
        each: What each number must be.
        whole: Whether only whole numbers are allowed.
    """

    each: Number
    whole: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the check that pydantic runs."""
        return core_schema.no_info_plain_validator_function(
            lambda values: check_numbers("", values, self.each, whole=self.whole),
            metadata={"whole": self.whole},
        )

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return what the JSON schema says of the field."""
        return {"type": "array", "minItems": 1, "items": self.each.__get_pydantic_json_schema__(core, handler)}


Count = Annotated[int, Number(minimum=1)]
"""A whole number from 1 on."""

Positive = Annotated[float, Number(minimum=0, exclusive=True)]
"""A number above 0."""

NotNegative = Annotated[float, Number(minimum=0)]
"""A number from 0 on."""

Share = Annotated[float, Number(minimum=0, maximum=1, exclusive=True)]
"""A share above 0, at most 1."""

ABSENT: Any = None
"""Value of a key that may be left out and has no default; written there, a null is refused."""


class Model(BaseModel):
    """A mapping of known keys; keys that are not known are refused with the nearest that is."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, protected_namespaces=()
    )
    absent: ClassVar[object] = None
    """What stands for a required key that is not there; no field takes it, and messages show it."""

    @_model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: object) -> dict[str, Any]:
        # Before the values, so that a misspelt key is told rather than the one that it leaves missing.
        if not isinstance(content, Mapping):
            raise InputError("", briefly(content), f"a mapping with the keys {', '.join(cls.model_fields)}")
        check_keys("", content, cls.model_fields)
        required = {name: cls.absent for name, entry in cls.model_fields.items() if entry.is_required()}
        return required | dict(content)


class JsonModel(Model):
    """A JSON object; of a key that must be there and is not, messages say that it is missing."""

    absent = MISSING


def validated(model: type[M], content: object, where: str = "") -> M:
    """Return content as the model that it fits.

    Args:
        model: The schema.
        content: What the user wrote.
        where: Name of the content, which begins the name of every field in messages; ``file:`` is told apart from it.

    Raises:
        InputError: Says of the first fault which field it is, its value, what is allowed and what to do.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _as_input_error(error, where) from None


def check_fields(instance: object, where: str = "") -> None:
    """Check the fields of a frozen dataclass by their annotations, and turn them into the types annotated.

    Args:
        instance: The dataclass, in its ``__post_init__``.
        where: Begins the name of every field in messages.

    Raises:
        InputError: As `validated`.
    """
    cls: Any = type(instance)
    model = schema_of(cls)
    checked = validated(model, {name: getattr(instance, name) for name in model.model_fields}, where)
    for name in model.model_fields:
        object.__setattr__(instance, name, getattr(checked, name))


def fields_of_json(cls: Any, content: object, where: str) -> dict[str, Any]:
    """Return the fields of a dataclass from a JSON object.

    Args:
        cls: The dataclass.
        content: The object.
        where: Begins the name of every field in messages.

    Raises:
        InputError: As `validated`.
    """
    found = validated(schema_of(cls), content, where)
    return {name: getattr(found, name) for name in found.model_fields_set}


class Document:
    """Base of frozen dataclasses that are JSON objects in files; their fields are checked as they are made."""

    where: ClassVar[str]
    """Name of the object, which begins the name of every field in messages."""

    def __post_init__(self) -> None:
        check_fields(self, self.where)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the check that pydantic runs where the object is a part of another."""
        return core_schema.no_info_plain_validator_function(cls.as_part)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return what the JSON schema of the whole says of the object."""
        return schema_of(cls).model_json_schema()  # type: ignore[arg-type]  # mypy: `type[Self]` is unhashable

    @classmethod
    def as_part(cls, content: Any) -> Self:
        """Return the object as a part of another, which names the field itself in messages.

        Raises:
            InputError: As `from_json`.
        """
        try:
            return content if isinstance(content, cls) else cls.from_json(content)
        except InputError as error:  # the whole names the field itself
            field = error.field.removeprefix(cls.where).removeprefix(".")
            raise InputError(field, error.value, error.allowed, error.remedy) from None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]  # a dataclass, as said above

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild what `to_json` wrote.

        Raises:
            InputError: If a key is unknown or missing, or a value is not allowed.
        """
        return cls(**fields_of_json(cls, content, cls.where))


@functools.cache
def schema_of(cls: Any) -> type[Model]:
    """Return the schema of a dataclass's fields; its ``model_json_schema`` is the JSON schema."""
    hints = get_type_hints(cls, include_extras=True)
    entries: dict[str, Any] = {}
    for entry in dataclasses.fields(cls):
        optional = not (entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING)
        entries[entry.name] = (hints[entry.name], None if optional else ...)
    return create_model(cls.__name__, __base__=JsonModel, **entries)


def check_numeric(field: str, values: ArrayLike) -> NDArray[Any]:
    """Return numbers as an array, of whatever shape they have.

    Raises:
        InputError: If they are no numbers.
    """
    given = np.asarray(values)
    if given.dtype.kind not in "iuf":
        raise InputError(field, briefly(values), "a number, or a list or an array of numbers")
    return given


def check_column(field: str, values: ArrayLike, each: Number, *, whole: bool = False) -> NDArray[np.float64]:
    """Return one number, or one for each configuration, as an array.

    Args:
        field: Name of the numbers.
        values: One number, or ``[configs]``.
        each: What each must be.
        whole: Whether only whole numbers are allowed.

    Returns:
        float64 ``[configs]``, or ``[1]``.

    Raises:
        InputError: If one of them is not such a number; tells the smallest such.
    """
    given = np.atleast_1d(np.asarray(check_numeric(field, values), np.float64))
    for number in sorted(set(given.ravel().tolist())):
        check_number(field, number, integer=whole, **dataclasses.asdict(each))
    return given


def check_numbers(field: str, values: object, each: Number, *, whole: bool = False) -> NDArray[np.float64]:
    """Return a list of numbers as an array, checked one by one.

    Args:
        field: Name of the list; an element is called ``field[index]``.
        values: A list, tuple or one-dimensional array, of NumPy, pandas or Arrow.
        each: What each number must be.
        whole: Whether only whole numbers are allowed.

    Returns:
        float64 ``[n]``, n >= 1.

    Raises:
        InputError: If it is no list, is empty, or an element is not such a number.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not values:
        raise InputError(field, briefly(values), f"a list of at least one {'whole ' if whole else ''}number")
    bounds = dataclasses.asdict(each)
    checked = [check_number(f"{field}[{i}]", value, integer=whole, **bounds) for i, value in enumerate(values)]
    return np.array(checked, dtype=np.float64)


def whole_numbers(field: str, values: object) -> tuple[int, ...]:
    """Return one whole number or several, in whatever holds them, as a tuple.

    Raises:
        InputError: If one is no whole number.
    """
    several = values if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping) else [values]
    return tuple(int(check_number(field, value, integer=True)) for value in several)


def briefly(value: object) -> object:
    """Return what a message should show of a value: scalars themselves, a name for anything larger."""
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, str):
        return value if len(value) <= _LONGEST_TEXT else f"{value[: _LONGEST_TEXT - 3]}..."
    if isinstance(value, Iterable):
        return "a list" if list(value) else "an empty list"
    return value


_KINDS = {
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
}
"""What pydantic's own checks allow, by the type of its error."""


def _as_input_error(error: ValidationError, where: str) -> InputError:
    """Return the first fault that pydantic found."""
    first = error.errors(include_url=False)[0]
    field = _joined(where, *first["loc"])
    context = first.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, InputError):
        return InputError(_joined(field, cause.field), cause.value, cause.allowed, cause.remedy)
    value = first["input"]
    if first["type"] == "literal_error":
        known = [word for word in context["expected"].split("'") if word not in ("", ", ", " or ")]
        return InputError(field, value, ", ".join(known), nearest_hint(str(value), known))
    return InputError(field, briefly(value), _KINDS.get(first["type"], first["msg"]))


def _joined(*parts: str | int) -> str:
    """Return a field's name from the keys and indices that lead to it."""
    name = ""
    for part in parts:
        index = f"[{part}]" if isinstance(part, int) else part
        separator = "" if not name or not index or index.startswith("[") else " " if name.endswith(":") else "."
        name += separator + index
    return name
