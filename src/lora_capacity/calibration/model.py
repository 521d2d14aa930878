"""A calibration and its file: JSON with named coefficients, units, ranges, errors and provenance."""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from jaxtyping import Bool
from numpy.typing import ArrayLike
from pydantic import Field, PlainValidator, create_model

from lora_capacity.costs import COEFFICIENTS, Costs, ExpertRouting, FrontEndCosts, LoadCosts, LoraKernels, StepCosts
from lora_capacity.costs.coefficients import unit_of
from lora_capacity.engines import ServerConfig, VllmBehaviour, smallest_max_lora_rank
from lora_capacity.errors import InputError, check_keys, check_number, nearest_hint
from lora_capacity.files import write_whole
from lora_capacity.hardware import Gpu
from lora_capacity.memory import (
    Deployment,
    EstimatedTerms,
    MemoryModel,
    MemoryPlan,
    Remedy,
    plan_memory,
    remedies,
    slot_bytes,
)
from lora_capacity.models import ModelShape, expand_target_modules
from lora_capacity.reading import read_json
from lora_capacity.schema import JsonModel, NotNegative, validated
from lora_capacity.workload import RunLengths

C = TypeVar("C", StepCosts, LoadCosts, FrontEndCosts)

SCHEMA_VERSION = 2
"""Version of the files that are written; those of version 1 are read too."""

_OWN = ("model", "gpu", "vllm_version")
"""What the coefficients of a calibration are of, and cannot be changed without them."""

_SPECIALIZED = (
    "specialize_active_lora: step times with it are derived from the launch grids in vLLM's sources; none was measured"
)

RENAMED_IN_2 = {
    "listed_s": "lora_listing_s",
    "passed_over_s": "skipped_request_s",
    "waiting_s": "queued_request_s",
    "host_s": "host_to_gpu_load_s",
}


@dataclass(frozen=True)
class Calibration:
    """Everything the twins need to know of one model on one GPU.

    Attributes:
        name: How it is called on the command line.
        model: Layer shapes.
        gpu: The GPU.
        vllm_version: Version whose behaviour and defaults hold.
        costs: Coefficients of step and load times.
        memory: Coefficients of the memory plan: fitted to this server, or estimated for any.
        fitted_ranges: Smallest and largest value of a setting that the coefficients were fitted over, by setting name.
        capacity_error: Standard deviation of the log ratio of predicted to measured throughput of overloaded
            held-out runs: how far the true capacity may lie from the predicted.
        device: ``gpu`` or ``cpu``: what the server computes on.
        deployment: How the model is laid out on GPUs.
        target_modules: Modules that the adapters adapt for which the coefficients hold.
        runs: Request lengths of the runs behind it; None for a calibration from microbenchmarks alone.
        accuracy: Errors on fitted and held-out data, as the fit reported them.
        provenance: Sources, date, command, data counts.
        measured_of: Model, GPU and version that the coefficients are of; it follows from the first.
    """

    name: str
    model: ModelShape
    gpu: Gpu
    vllm_version: str
    costs: Costs
    memory: MemoryModel | EstimatedTerms
    fitted_ranges: Mapping[str, tuple[float, float]]
    capacity_error: float
    device: str = "gpu"
    deployment: Deployment = dataclasses.field(default_factory=Deployment)
    target_modules: str | tuple[str, ...] = "all-linear"
    runs: RunLengths | None = None
    accuracy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measured_of: tuple[ModelShape, str, str] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        own = (self.model, self.gpu.name, self.vllm_version)
        if self.measured_of is None:
            object.__setattr__(self, "measured_of", own)
        elif self.measured_of != own:
            remedy = "derive_calibration(model, gpu, vllm_version=...) makes one for another server"
            changed = next(name for name, a, b in zip(_OWN, own, self.measured_of, strict=True) if a != b)
            raise InputError(changed, own[_OWN.index(changed)], "what the coefficients were measured with", remedy)

    @property
    def behaviour(self) -> VllmBehaviour:
        """Defaults and rules of the calibration's vLLM version."""
        return VllmBehaviour.for_version(self.vllm_version, self.device)

    @property
    def coefficients(self) -> dict[str, float]:
        """All coefficients by name; those that the device does without are 0."""
        return {
            each.name: np.asarray(getattr(getattr(self.costs, each.group), each.name)).item() for each in COEFFICIENTS
        }

    def outside(self, **settings: Any) -> Bool[np.ndarray, "*shape"]:
        """Where any setting lies outside the range that was fitted over.

        Args:
            **settings: Arrays by setting name; names without a fitted range are ignored. They broadcast.

        Returns:
            Booleans in the broadcast shape.
        """
        given = np.broadcast_arrays(*(np.asarray(value, dtype=float) for value in settings.values()))
        outside = np.zeros(given[0].shape, dtype=bool)
        for name, values in zip(settings, given, strict=True):
            low, high = self.fitted_ranges.get(name, (-np.inf, np.inf))
            outside |= (values < low) | (values > high)
        return outside

    def extrapolations(self, **settings: float) -> list[str]:
        """Say in a sentence each which settings of one configuration lie outside the range that was fitted over.

        Args:
            **settings: Values by setting name; names without a fitted range are ignored.
        """
        found = [
            f"{name} {settings[name]:g} is outside the calibrated range {low:g} to {high:g}: extrapolated"
            for name, (low, high) in self.fitted_ranges.items()
            if name in settings and self.outside(**{name: settings[name]})
        ]
        return [*found, _SPECIALIZED] if self.costs.kernels.specialized else found

    def specialized(self) -> Self:
        """Return the same of servers with ``specialize_active_lora``, whose LoRA kernels cover the adapters in a step.

        Raises:
            InputError: If the vLLM version has no such flag.
        """
        if not self.behaviour.specializes_active_lora:
            allowed = f"off: vLLM {self.vllm_version} has no such flag"
            raise InputError("--specialize-active-lora", "on", allowed, "it is for 0.16 and later")
        deployment = dataclasses.replace(self.deployment, specialize_active_lora=True)
        kernels = LoraKernels.of_server(self.model, deployment, self.behaviour, self.target_modules)
        costs: Costs = dataclasses.replace(self.costs, kernels=kernels)
        return dataclasses.replace(self, deployment=deployment, costs=costs)

    def server(self, **settings: Any) -> ServerConfig:
        """Return a server's settings by vLLM's names, with the defaults of its version on this GPU for those not given.

        Raises:
            InputError: If a name is unknown or a value is not allowed.
        """
        if settings.get("target_modules") is None:
            settings["target_modules"] = self.target_modules
        elif self.target_modules not in ("all-linear", settings["target_modules"]):
            allowed = f"{self.target_modules}, which the calibration is derived for"
            raise InputError("target_modules", settings["target_modules"], allowed)
        server = ServerConfig.with_defaults(self.behaviour, self.gpu, self.model, **settings)
        usual = Deployment().to_json()
        layout = {name: value for name, value in self.deployment.to_json().items() if value != usual[name]}
        return dataclasses.replace(server, layout=layout)

    def smallest_max_lora_rank(self, rank: int) -> int:
        """Return the smallest allowed ``max_lora_rank`` that takes adapters of a rank.

        Raises:
            InputError: If the version takes no such rank.
        """
        return smallest_max_lora_rank(rank, self.behaviour)

    def plan_memory(
        self, server: ServerConfig, *, gpu_memory_bytes: ArrayLike | None = None, **columns: ArrayLike
    ) -> MemoryPlan:
        """Plan the GPU's memory of servers that share some settings.

        Args:
            server: Their settings.
            gpu_memory_bytes: Memory of another GPU than the calibration's.
            **columns: Settings in which they differ, by vLLM's names, each ``[configs]``.

        Returns:
            The plan, ``[configs]``; ``[1]`` for one server.
        """
        memory_bytes = self.gpu.memory_bytes if gpu_memory_bytes is None else int(np.asarray(gpu_memory_bytes))
        return plan_memory(
            self.model,
            dataclasses.replace(self.gpu, memory_bytes=memory_bytes),
            self.memory,
            behaviour=self.behaviour,
            deployment=self.deployment,
            **server.planned | columns,
        )

    def remedies(self, server: ServerConfig, given: Mapping[str, Any]) -> list[Remedy]:
        """Return what makes room for a server, one value of each setting, those first with which it starts.

        Args:
            server: Its settings.
            given: Those that may be changed, as `lora_capacity.memory.remedies` takes them.
        """
        return remedies(lambda changes: self.plan_memory(server, **changes), given)

    def slot_bytes(self, max_lora_rank: ArrayLike) -> np.ndarray:
        """Return the bytes of one adapter slot, before the allocator's rounding, in the shape of ``max_lora_rank``."""
        reserved = self.behaviour.reserved_modules(self.target_modules)
        return slot_bytes(self.model, self.behaviour, max_lora_rank, reserved)

    def to_json(self) -> dict[str, Any]:
        """Return the content of a calibration file."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "model": self.model.to_json(),
            "gpu": self.gpu.to_json(),
            "vllm_version": self.vllm_version,
            "device": self.device,
            "coefficients": {
                "step": _with_units(self.costs.step),
                "loads": _with_units(self.costs.loads),
                "front_end": _with_units(self.costs.front_end),
            },
            "memory": self.memory.to_json(),
            "fitted_ranges": {name: list(bounds) for name, bounds in self.fitted_ranges.items()},
            "capacity_error": self.capacity_error,
        }
        if self.deployment != Deployment():
            content["deployment"] = self.deployment.to_json()
        if self.target_modules != "all-linear":
            one = isinstance(self.target_modules, str)
            content["target_modules"] = self.target_modules if one else list(self.target_modules)
        if self.runs is not None:
            content["runs"] = self.runs.to_json()
        return content | {"accuracy": dict(self.accuracy), "provenance": dict(self.provenance)}

    @classmethod
    def from_json(cls, content: object, source: str = "calibration") -> Self:
        """Rebuild what :meth:`to_json` wrote.

        Args:
            content: The parsed file.
            source: What to call it in complaints.

        Raises:
            InputError: If it is not a calibration of this schema, or a field is missing, unknown or out of range.
        """
        if not isinstance(content, Mapping):
            raise InputError(source, type(content).__name__, "a JSON object")
        version = content.get("schema_version")
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            remedy = "update lora-capacity" if isinstance(version, int) and version > SCHEMA_VERSION else ""
            raise InputError(f"{source}: schema_version", version, f"1 to {SCHEMA_VERSION}", remedy)
        content = _from_version_1(source, content) if version == 1 else content
        fields = dict(validated(CalibrationFile, content, f"{source}:"))
        del fields["schema_version"]
        coefficients, model = fields.pop("coefficients"), fields["model"]
        behaviour = VllmBehaviour.for_version(fields["vllm_version"], fields["device"])
        kernels = LoraKernels.of_server(model, fields["deployment"], behaviour, fields["target_modules"])
        costs = Costs(**dict(coefficients), kernels=kernels, experts=ExpertRouting.of_model(model))
        return cls(costs=costs, **fields)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a calibration file.

        Raises:
            InputError: If there is no such file, it is not JSON, or not a calibration of this schema.
        """
        return cls.from_json(read_json(path, "a calibration file"), str(path))

    def save(self, path: str | Path) -> None:
        """Write the calibration file, whole or not at all; raises OSError if it cannot be written."""
        write_whole(path, json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n")


def _value(content: object, name: str) -> float:
    """Return a coefficient's value from a file; a unit that stands beside it is that of the coefficient."""
    if not isinstance(content, Mapping):
        raise InputError("", None, "an object with value and unit")
    check_keys("", content, ("value", "unit"))
    if content.get("unit", unit_of(name)) != unit_of(name):
        raise InputError("unit", content["unit"], unit_of(name))
    return check_number("", content.get("value"), minimum=0)


def _range(content: object) -> tuple[float, float]:
    if not isinstance(content, list) or len(content) != 2:
        raise InputError("", content, "a list of the smallest and the largest value")
    low = check_number("", content[0])
    return low, check_number("", content[1], minimum=low)


def _valued(costs: type[C]) -> Callable[[object], C]:
    """Return a reader of coefficients with their units; those that are 0 by default may be left out."""
    entries: dict[str, Any] = {
        entry.name: (
            Annotated[float, PlainValidator(functools.partial(_value, name=entry.name))],
            ... if entry.default is dataclasses.MISSING else entry.default,
        )
        for entry in dataclasses.fields(costs)
    }
    schema = create_model(costs.__name__, __base__=JsonModel, **entries)
    return lambda content: costs(**dict(validated(schema, content)))


def _accuracy(content: object) -> dict[str, Any]:
    """Return ``accuracy``; of what it tells of coefficients, for their draws, every number is checked."""
    if not isinstance(content, Mapping):
        raise InputError("", type(content).__name__, "an object")
    errors, below = content.get("coefficient_errors", {}), content.get("coefficient_correlations")
    if not isinstance(errors, Mapping):
        raise InputError("coefficient_errors", errors, "an object of numbers")
    for name, error in errors.items():
        check_number(f"coefficient_errors.{name}", error, minimum=0)
    if below is not None:
        sound = isinstance(below, list) and all(isinstance(row, list) and len(row) == i for i, row in enumerate(below))
        if not sound or len(below) != len(errors):
            allowed = f"a triangle of numbers, {len(errors)} rows as coefficient_errors, of 0, 1, 2, ... numbers"
            raise InputError("coefficient_correlations", below, allowed)
        for index, row in enumerate(below):
            for each in row:
                check_number(f"coefficient_correlations[{index}]", each, minimum=-1, maximum=1)
    return dict(content)


def _memory(content: object) -> MemoryModel | EstimatedTerms:
    """Return the terms of memory: fitted ones, or those for any GPU, which name what they were fitted to."""
    terms = EstimatedTerms if isinstance(content, Mapping) and "source" in content else MemoryModel
    return terms.as_part(content)


def _modules(content: object) -> str | tuple[str, ...]:
    """Return target modules from a file."""
    if not isinstance(content, str | list) or not all(isinstance(each, str) for each in content):
        raise InputError("", content, "all-linear, attention, or a list of names")
    modules = content if isinstance(content, str) else tuple(content)
    expand_target_modules(modules)
    return modules


class _Coefficients(JsonModel):
    """``coefficients``: by what they are a cost of."""

    step: Annotated[StepCosts, PlainValidator(_valued(StepCosts), json_schema_input_type=dict[str, Any])]
    loads: Annotated[LoadCosts, PlainValidator(_valued(LoadCosts), json_schema_input_type=dict[str, Any])]
    front_end: Annotated[
        FrontEndCosts, PlainValidator(_valued(FrontEndCosts), json_schema_input_type=dict[str, Any])
    ] = Field(default_factory=FrontEndCosts)


class CalibrationFile(JsonModel):
    """A calibration file; its ``model_json_schema`` is the JSON schema of the format."""

    schema_version: int
    name: str
    model: ModelShape
    gpu: Gpu
    vllm_version: str
    coefficients: _Coefficients
    memory: Annotated[MemoryModel | EstimatedTerms, PlainValidator(_memory, json_schema_input_type=dict[str, Any])]
    fitted_ranges: dict[str, Annotated[tuple[float, float], PlainValidator(_range, json_schema_input_type=list[float])]]
    capacity_error: NotNegative
    device: Literal["gpu", "cpu"] = "gpu"
    deployment: Deployment = Field(default_factory=Deployment)
    target_modules: Annotated[
        str | tuple[str, ...], PlainValidator(_modules, json_schema_input_type=str | list[str])
    ] = "all-linear"
    runs: RunLengths | None = None
    accuracy: Annotated[dict[str, Any], PlainValidator(_accuracy, json_schema_input_type=dict[str, Any])] = Field(
        default_factory=dict
    )
    provenance: dict[str, Any] = Field(default_factory=dict)


def bundled_names() -> tuple[str, ...]:
    """Names of the calibrations that come with the package, sorted."""
    folder = importlib.resources.files("lora_capacity.calibration") / "bundled"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def read_calibration(name_or_path: str | Path) -> Calibration:
    """Return a bundled calibration by name, or read a file.

    Raises:
        InputError: If it is neither a bundled name nor a readable calibration file.
    """
    name, names = str(name_or_path), bundled_names()
    if name in names:
        resource = importlib.resources.files("lora_capacity.calibration") / "bundled" / f"{name}.json"
        return Calibration.from_json(json.loads(resource.read_text(encoding="utf-8")), name)
    if name.endswith(".json") or Path(name).exists():
        return Calibration.from_file(name)
    raise InputError("calibration", name, f"a file, or one of {', '.join(names)}", nearest_hint(name, names))


def _with_units(coefficients: Any) -> dict[str, dict[str, Any]]:
    """Return coefficients with their units; those that a kind of device does not have, 0 by default, are left out."""
    return {
        entry.name: {"value": value, "unit": unit_of(entry.name)}
        for entry in dataclasses.fields(coefficients)
        if (value := float(getattr(coefficients, entry.name))) != entry.default
    }


def _from_version_1(source: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's content with the coefficients called as they are from version 2 on, wherever they are named."""
    for old, new in RENAMED_IN_2.items():
        if new in content:
            raise InputError(f"{source}: {new}", new, f"{old}, as schema version 1 calls it")
    return {
        RENAMED_IN_2.get(key, key): _from_version_1(source, value) if isinstance(value, Mapping) else value
        for key, value in content.items()
    }
