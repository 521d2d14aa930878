"""Calibrations from first principles: what a model's shape and a GPU's data sheet tell of the step time.

Each coefficient is work (`StepWork`) over what the GPU's data sheet promises times an efficiency (`Efficiencies`), or a
time that hosts take. How far it may be off is known: efficiencies have a distribution, and GPUs and models differ by
more than efficiencies tell. All is lognormal, so that what was measured on some GPUs with some models corrects the rest
by linear algebra, the more the nearer they are.
"""

import datetime
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lora_capacity.calibration.efficiencies import Efficiencies
from lora_capacity.calibration.model import Calibration, bundled_names, read_calibration
from lora_capacity.calibration.work import StepWork
from lora_capacity.costs import COEFFICIENTS, Costs, ExpertRouting, LoraKernels, step_time_s
from lora_capacity.engines import NEWEST, VllmBehaviour
from lora_capacity.errors import InputError, check_type
from lora_capacity.hardware import Processor, find_gpu
from lora_capacity.memory import Deployment, EstimatedTerms
from lora_capacity.models import ModelShape, find_shape

_LINKED_BYTES_PER_S = 2e11
"""Speed from which on a link is NVLink or the like, which all-reduces take directly: PCIe 5 has 1.3e11."""

_MOST_GPUS = 8
"""GPUs that are linked inside a node."""

_TOLD = 0.005
"""Error of the logarithm of a measured coefficient as it is told: files keep five digits, fits stop earlier."""

_OTHER_MAKERS = 0.3
"""Error of the logarithm of step times on GPUs that are not NVIDIA's, of which no speed was seen; assumed."""

_SMALLEST_PREFILL = 0.05
"""Of a prompt token's products, what remains on top of a decode token's at least, lest a logarithm be of nothing."""


class Differences(NamedTuple):
    """How much a coefficient differs beyond what work and efficiencies tell: standard deviations of its logarithm.

    Attributes:
        gpus: Between kinds of GPU.
        models: Between models on one GPU.
    """

    gpus: float
    models: float


_DIFFERENCES = {
    "base_s": Differences(0.12, 0.03),
    "token_s": Differences(0.20, 0.10),
    "prefill_token_s": Differences(0.20, 0.10),
    "kv_token_s": Differences(0.15, 0.08),
    "expert_s": Differences(0.30, 0.25),
    "lora_s": Differences(0.25, 0.15),
    "lora_token_s": Differences(0.25, 0.10),
    "expand_block_s": Differences(0.20, 0.07),
    "shrink_block_s": Differences(0.20, 0.07),
    "adapter_s": Differences(0.25, 0.07),
    "adapter_rank_s": Differences(0.25, 0.15),
    "host_to_gpu_load_s": Differences(0.40, 0.60),
    "disk_s": Differences(1.00, 1.00),
    "disk_rank_s": Differences(1.00, 1.00),
}
"""Between models: what the two published H100 profiles differ by. Between GPUs: assumed; speeds of other GPUs that the
efficiencies are fitted to bear out the first four."""

_OTHERWISE = Differences(0.20, 0.10)
"""What takes a host's processor time."""

_TYPICAL: dict[str, Any] = {
    "tokens": 300.0,
    "prefill_tokens": 160.0,
    "kv_tokens": 53e3,
    "adapters": 30.0,
    "skipped": 0.0,
    "queued": 0.0,
    "loaded": 48.0,
    "max_loras": 32.0,
    "max_lora_rank": 16.0,
}
"""A step near the capacity of a server with the lengths of ShareGPT, 223 tokens in and 197 out (arXiv 2508.08343): what
errors of coefficients are weighed by."""


@dataclass(frozen=True)
class Target:
    """What coefficients are derived for.

    Attributes:
        model: Layer shapes.
        processor: The GPU.
        deployment: How the model is laid out on GPUs of this kind.
        behaviour: The vLLM version.
        target_modules: Modules that the adapters adapt.
    """

    model: ModelShape
    processor: Processor
    deployment: Deployment
    behaviour: VllmBehaviour
    target_modules: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        gpus = self.deployment.tensor_parallel_size
        if gpus > _MOST_GPUS:
            raise InputError("tensor_parallel_size", gpus, f"at most {_MOST_GPUS}: of several nodes nothing is known")

    @functools.cached_property
    def work(self) -> StepWork:
        """Work of a step on one GPU."""
        reserved = self.behaviour.reserved_modules(self.target_modules)
        return StepWork.of_model(self.model, self.deployment, self.target_modules, reserved)

    @functools.cached_property
    def kernels(self) -> LoraKernels:
        """Launch grids of the LoRA kernels."""
        return LoraKernels.of_server(self.model, self.deployment, self.behaviour, self.target_modules)

    def coefficients(self, e: Mapping[str, float]) -> dict[str, float]:
        """Return the coefficients of the step and of loads that follow from the work, by name.

        Args:
            e: Efficiencies by name.
        """
        work, gpu = self.work, self.processor
        bandwidth = gpu.bandwidth_bytes_per_s
        behaviour, deployment = self.behaviour, self.deployment
        host = e["async_share"] if behaviour.scheduler.async_scheduling else 1.0
        linked = (gpu.link_bytes_per_s or 0.0) >= _LINKED_BYTES_PER_S
        reading_s = work.weight_bytes / (bandwidth * e["weight_bandwidth_share"])
        reading_s += work.packed_bytes / (bandwidth * e["packed_bandwidth_share"])
        layers_s = work.layers * e["layer_s"] + work.expert_layers * e["expert_layer_s"]
        layers_s += work.messages * e["message_s" if linked else "pcie_message_s"]
        on_gpu_s = reading_s + layers_s
        if deployment.enforce_eager:
            on_gpu_s = max(on_gpu_s, work.layers * e["eager_layer_s"])
        compute_s = work.token_flop / (_flop_per_s(gpu, work.rate) * e["matmul_share"])
        # Half of the link's speed, which counts both ways, is one way.
        message_s = work.message_bytes / (0.5 * (gpu.link_bytes_per_s or np.inf) * e["link_share"])
        unhidden = min(e["unhidden_share"], 1.0 - _SMALLEST_PREFILL)
        cycle_s = 1.0 / _cycles_per_s(gpu)
        tiles, slices = (np.asarray(each).item() for each in (self.kernels.expand_tiles, self.kernels.shrink_slices))
        found = {
            "base_s": host * e["engine_step_s"] + on_gpu_s,
            "token_s": host * e["sequence_s"] + unhidden * compute_s + message_s,
            "prefill_token_s": (1.0 - unhidden) * compute_s,
            # Bound by memory, or, where many query heads share keys and values, by what computes.
            "kv_token_s": max(
                work.kv_bytes / (bandwidth * e["kv_bandwidth_share"]), work.query_heads * e["head_cycles"] * cycle_s
            ),
            "expert_s": work.expert_bytes / (bandwidth * e["expert_bandwidth_share"]),
            "lora_s": work.lora_kernels * e["lora_kernel_s"],
            "lora_token_s": work.activation_bytes / (bandwidth * e["lora_bandwidth_share"]),
            "expand_block_s": e["expand_block_cycles"] * cycle_s,
            "shrink_block_s": e["shrink_block_cycles"] * cycle_s,
            "adapter_s": work.layers * tiles * e["adapter_tile_cycles"] * cycle_s,
            "adapter_rank_s": work.layers * slices * e["adapter_rank_cycles"] * cycle_s,
            "host_to_gpu_load_s": work.adapter_tensors * e["adapter_tensor_s"],
            "disk_s": work.adapter_tensors * e["disk_tensor_s"],
            "disk_rank_s": work.adapter_bytes * deployment.tensor_parallel_size / e["disk_bytes_per_s"],
        }
        return {name: value for name, value in found.items() if value > 0}


def _flop_per_s(gpu: Processor, rate: str) -> float:
    """Return what the data sheet promises, of 16 bits where it has not the type."""
    kinds = (rate, "bfloat16", "float16")
    return next(gpu.flop_per_s[kind] for kind in kinds if kind in gpu.flop_per_s)


_USUAL_CYCLES_PER_S = 132 * 1.98e9
"""Cycles of all multiprocessors of an H100, for GPUs whose data sheet does not tell theirs."""


def _cycles_per_s(gpu: Processor) -> float:
    if gpu.multiprocessors is None or gpu.clock_hz is None:
        return _USUAL_CYCLES_PER_S
    return gpu.multiprocessors * gpu.clock_hz


class LogNormal(NamedTuple):
    """Coefficients with their distribution.

    Attributes:
        names: Names of the coefficients.
        mean: Means of their logarithms, ``[coefficients]``.
        covariance: Of their logarithms, ``[coefficients, coefficients]``.
    """

    names: tuple[str, ...]
    mean: Float[np.ndarray, " coefficients"]
    covariance: Float[np.ndarray, "coefficients coefficients"]

    @property
    def values(self) -> dict[str, float]:
        """Medians by name."""
        return dict(zip(self.names, np.exp(self.mean).tolist(), strict=True))

    @property
    def spreads(self) -> dict[str, float]:
        """Standard deviations of the logarithms by name."""
        return dict(zip(self.names, np.sqrt(np.diag(self.covariance)).tolist(), strict=True))

    @property
    def accuracy(self) -> dict[str, Any]:
        """What a calibration's ``accuracy`` keeps: errors, and correlations of each with those before it."""
        spread = np.sqrt(np.diag(self.covariance))
        correlation = self.covariance / np.outer(spread, spread)
        return {
            "coefficient_errors": {name: round(each, 4) for name, each in self.spreads.items()},
            "coefficient_correlations": [
                [round(float(each), 2) for each in row[:index]] for index, row in enumerate(correlation)
            ],
        }


def derive_coefficients(target: Target, efficiencies: Efficiencies, measured: Sequence[Calibration] = ()) -> LogNormal:
    """Return the coefficients of a target, corrected by what was measured elsewhere.

    Args:
        target: Model, GPU and vLLM version.
        efficiencies: What GPUs reach of their data sheets.
        measured: Calibrations of other models or GPUs; those of GPUs that the catalogue does not know, or of CPUs, are
            left out.
    """
    believed = _Belief.of(target, efficiencies)
    seen = [pair for each in measured if (pair := _measurement(each, efficiencies)) is not None]
    if not seen:
        return LogNormal(believed.names, believed.mean, believed.covariance_with(believed))
    beliefs = [each.belief for each in seen]
    across = np.concatenate([believed.covariance_with(each) for each in beliefs], axis=1)
    within = np.block([[one.covariance_with(other) for other in beliefs] for one in beliefs])
    surprise = np.concatenate([each.surprise for each in seen])
    known = ~np.isnan(surprise)
    across, within, surprise = across[:, known], within[np.ix_(known, known)], surprise[known]
    within += _TOLD**2 * np.eye(len(surprise))
    gain = np.linalg.solve(within, across.T).T
    covariance = believed.covariance_with(believed) - gain @ across.T
    return LogNormal(believed.names, believed.mean + gain @ surprise, covariance)


@dataclass(frozen=True)
class _Belief:
    """Coefficients before anything measured of them counts.

    Attributes:
        target: What they are of.
        names: Names of the coefficients.
        mean: Means of their logarithms.
        slopes: Derivatives of these by the logarithms of the efficiencies, ``[coefficients, efficiencies]``.
        shared: Covariance of the efficiencies' logarithms.
        constant: Standard deviations of those that no efficiency tells, alike everywhere; 0 of the others.
    """

    target: Target
    names: tuple[str, ...]
    mean: Float[np.ndarray, " coefficients"]
    slopes: Float[np.ndarray, "coefficients efficiencies"]
    shared: Float[np.ndarray, "efficiencies efficiencies"]
    constant: Float[np.ndarray, " coefficients"]

    @classmethod
    def of(cls, target: Target, efficiencies: Efficiencies) -> "_Belief":
        values = dict(efficiencies.values)
        derived = target.coefficients(values)
        logs = {name: float(np.log(value)) for name, value in derived.items()}
        slopes = log_slopes(lambda e: np.log(list(target.coefficients(e).values())), values)
        usual = {each.name: each.usual["gpu"] for each in COEFFICIENTS if "gpu" in each.usual and each.name not in logs}
        names = tuple(each.name for each in COEFFICIENTS if each.name in logs or each.name in usual)
        order = {name: row for row, name in enumerate(derived)}
        nothing = np.zeros(slopes.shape[1])
        return cls(
            target,
            names,
            np.array([logs[name] if name in logs else np.log(usual[name].centre) for name in names]),
            np.array([slopes[order[name]] if name in order else nothing for name in names]),
            efficiencies.covariance,
            np.array([0.0 if name in logs else usual[name].spread for name in names]),
        )

    def covariance_with(self, other: "_Belief") -> Float[np.ndarray, "coefficients others"]:
        """Return the covariance of these coefficients with others'."""
        covariance = self.slopes @ self.shared @ other.slopes.T
        same_gpu = self.target.processor.name == other.target.processor.name
        same_model = self.target.model.served_as == other.target.model.served_as
        place = {name: column for column, name in enumerate(other.names)}
        for row, name in enumerate(self.names):
            if name in place:
                differ = _DIFFERENCES.get(name, _OTHERWISE)
                own = self.constant[row] ** 2
                own += same_gpu * differ.gpus**2 + (same_gpu and same_model) * differ.models**2
                covariance[row, place[name]] += own
        return np.asarray(covariance)


def log_slopes(
    function: Callable[[dict[str, float]], Float[np.ndarray, " values"]], values: Mapping[str, float]
) -> Float[np.ndarray, "values names"]:
    """Return the derivatives of a function's values by the logarithms of its arguments, by small differences."""
    step = 1e-4  # of a logarithm: curvature and rounding are both far below
    start = function(dict(values))
    columns = [(function({**values, name: values[name] * np.exp(step)}) - start) / step for name in values]
    return np.stack(columns, axis=1)


class _Measurement(NamedTuple):
    """What a measured calibration tells.

    Attributes:
        belief: What is believed of its coefficients without it.
        surprise: By how much their logarithms differ from that, ``[coefficients]``; NaN where it has no such one.
    """

    belief: _Belief
    surprise: Float[np.ndarray, " coefficients"]


def _measurement(calibration: Calibration, efficiencies: Efficiencies) -> _Measurement | None:
    """Return what a calibration tells of its coefficients; None of a CPU's, or of a GPU that is not in the catalogue.

    They are taken as they are: each by itself is known less well, but errors of one make up for those of another.
    """
    if calibration.device != "gpu":
        return None
    try:
        processor = find_gpu(calibration.gpu.name)
    except InputError:
        return None
    belief = _Belief.of(
        Target(calibration.model, processor, calibration.deployment, calibration.behaviour, calibration.target_modules),
        efficiencies,
    )
    found = calibration.coefficients
    logs = [np.log(found[name]) if found[name] > 0 else np.nan for name in belief.names]
    return _Measurement(belief, np.array(logs) - belief.mean)


def derive_calibration(
    model: ModelShape | str,
    gpu: Processor | str,
    *,
    quantization: str | None = None,
    deployment: Deployment | None = None,
    target_modules: str | tuple[str, ...] = "all-linear",
    vllm_version: str = NEWEST,
    name: str | None = None,
    efficiencies: Efficiencies | None = None,
    terms: EstimatedTerms | None = None,
    measured: Sequence[Calibration] | None = None,
) -> Calibration:
    """Derive the calibration of a model on a GPU that nobody has profiled.

    Args:
        model: Layer shapes, or a name or path of a model as `lora_capacity.models.find_shape` takes it.
        gpu: A GPU, or its name in the catalogue.
        quantization: How the weights of a model given by name are stored; None: as its ``config.json`` says.
        deployment: How the model is laid out on GPUs of this kind; None: on one.
        target_modules: Modules that the adapters adapt, as `ServerConfig` takes them: kernels run for those that slots
            are reserved for, which before vLLM 0.19 are all.
        vllm_version: The vLLM version.
        name: Name of the calibration; by default model and GPU.
        efficiencies: What GPUs reach of their data sheets; None: the bundled ones.
        terms: Memory that shapes do not tell; None: the bundled terms.
        measured: Measured calibrations that correct it; None: the bundled ones.

    Raises:
        InputError: If model, GPU or a module is not known, the GPUs do not divide the model, or it is laid out in
            stages.

    Valid for: decode steps of dense models; experts, quantized weights and adapters on GPUs other than the H100 rest on
    few measurements, and their spreads say so.
    """
    deployment = deployment or Deployment()
    model = find_shape(model, quantization) if isinstance(model, str) else model
    processor = find_gpu(gpu) if isinstance(gpu, str) else gpu
    check_type("model", model, ModelShape, "a ModelShape, or the name or path of a model")
    check_type("gpu", processor, Processor, "a GPU of the catalogue, or its name")
    check_type("vllm_version", vllm_version, str, "a version, such as 0.20.0")
    measured = [read_calibration(each) for each in bundled_names()] if measured is None else measured
    efficiencies = efficiencies or Efficiencies.bundled()
    behaviour = VllmBehaviour.for_version(vllm_version)
    target = Target(model, processor, deployment, behaviour, target_modules)
    found = derive_coefficients(target, efficiencies, measured)
    # What differs from machine to machine is in what was measured on the same kind of GPU.
    same = any(each.device == "gpu" and each.gpu.name == processor.name for each in measured)
    unexplained = 0.0 if same else efficiencies.step_spread
    if processor.compute_capability is None:
        unexplained = max(unexplained, _OTHER_MAKERS)
    costs = Costs.of_values(found.values, target.kernels, ExpertRouting.of_model(model))
    error = float(np.hypot(capacity_error(costs, found), unexplained))
    # At best as sure as what was measured.
    error = max(error, min((each.capacity_error for each in measured), default=0.0))
    gpus = "" if deployment.tensor_parallel_size == 1 else f"{deployment.tensor_parallel_size}x"
    return Calibration(
        name=name or f"{model.name.rpartition('/')[2]}-{gpus}{processor.name}-derived".lower().replace(" ", "-"),
        model=model,
        gpu=processor.gpu,
        vllm_version=vllm_version,
        costs=costs,
        memory=terms or EstimatedTerms.bundled(),
        fitted_ranges={},
        capacity_error=round(error, 4),
        deployment=deployment,
        target_modules=target_modules,
        accuracy=found.accuracy,
        provenance={
            "source": "derived from the model's shape and the GPU's data sheet",
            "derived_on": datetime.date.today().isoformat(),
            "efficiencies": efficiencies.source,
            "corrected_by": [each.name for each in measured],
            "rests_on": _grounds(target, found, measured),
        },
    )


def _grounds(target: Target, found: LogNormal, measured: Sequence[Calibration]) -> dict[str, str]:
    """Say of each coefficient what it rests on: which GPU was measured, and whether it is another one."""
    names = {each.gpu.name for each in measured if each.device == "gpu"}
    own = target.processor.name
    if own in names:
        told = f"measured on the {own} with another model, scaled by shape"
    elif names:
        told = f"{', '.join(sorted(names))} measured, scaled to the {own} by data sheet and shape"
    else:
        told = "data sheet and shape alone"
    # Of those that no measured calibration has, speeds of other servers tell.
    seen = {name for each in measured for name, value in each.coefficients.items() if value > 0}
    scaled = target.coefficients(Efficiencies.first_guess().values)

    def ground(name: str) -> str:
        if name not in scaled:
            return "measured on hosts of other servers, which are taken to be alike" if names else "assumed"
        return told if name in seen or not names else "data sheet and shape alone"

    return {name: ground(name) for name in found.names}


def capacity_error(costs: Costs, found: LogNormal) -> float:
    """Return the standard deviation of the logarithm of a typical step time, by the errors of its coefficients.

    Args:
        costs: Whose launch grids and experts hold.
        found: The coefficients; others count as 0.
    """
    step = 1e-2  # of a logarithm: single precision tells less of smaller ones
    moved = np.exp(step * np.concatenate([np.zeros((1, len(found.names))), np.eye(len(found.names))]))
    columns = {name: moved[:, column] * value for column, (name, value) in enumerate(found.values.items())}
    times_s = np.asarray(step_time_s(Costs.of_values(columns, costs.kernels, costs.experts), **_TYPICAL), np.float64)
    shares = np.log(times_s[1:] / times_s[0]) / step
    return float(np.sqrt(shares @ found.covariance @ shares))
