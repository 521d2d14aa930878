"""Estimating the memory that shapes do not tell from the starts of many servers."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from lora_capacity.errors import InputError
from lora_capacity.facts import StartupPrediction, kv_error, predict_startup
from lora_capacity.measurements import Startup
from lora_capacity.memory import EstimatedTerms, Start
from lora_capacity.units import BYTES_PER_GIB, BYTES_PER_MIB

FIRST_GUESS = EstimatedTerms(
    context_bytes=0.2 * BYTES_PER_GIB,
    collective_bytes=0.5 * BYTES_PER_GIB,
    linked_collective_bytes=1.5 * BYTES_PER_GIB,
    lora_kernel_bytes=0.21 * BYTES_PER_GIB,
    logit_bytes=14.0,
    sorted_logit_bytes=38.0,
    step_bytes_per_token=16384.0,
    compile_scratch_bytes=275 * BYTES_PER_MIB,
    graph_bytes=0.4 * BYTES_PER_GIB,
    graph_bytes_per_layer=16 * BYTES_PER_MIB,
    least_factor=0.5,
    most_factor=2.0,
    weight_spread=0.003,
    source="first guess: the published H100 start-ups (arXiv 2508.08343), and copies of the logits counted in the code",
)
"""What a fit without other knowledge begins with."""

_WIDTHS = {
    "context_bytes": 0.7,
    "collective_bytes": 0.7,
    "linked_collective_bytes": 0.5,
    "logit_bytes": 0.1,
    "sorted_logit_bytes": 0.1,
    "step_bytes_per_token": 0.5,
    "compile_scratch_bytes": 0.3,
    "graph_bytes": 0.5,
    "graph_bytes_per_layer": 0.5,
}
"""Fitted terms, each with the spread of its logarithm around where the fit begins; starts with and without LoRA that
differ in nothing else, which the kernels' memory would need, are too few."""

_RELATIVE = 0.1  # error of a logged activation that counts as one
_NON_TORCH_BYTES = 0.2 * BYTES_PER_GIB  # the same of what is outside PyTorch, whose smallest are rounded to 0.02 GiB
_GRAPHS = 0.4  # relative error of CUDA graphs that counts as one: they differ most
_OUTSIDE = (5, 95)  # percentiles of the factor of the sum
_LEAST_FACTOR = 0.05  # where less was taken than is counted as certain

_FEWEST = 20
"""Starts from which on the spread is estimated anew: one in twenty lies outside each end."""


@dataclass(frozen=True)
class _Observation:
    """A start with what it logged of the memory of its first GPU, bytes; NaN where not seen.

    Attributes:
        start: What was started.
        activation_bytes: Peak of PyTorch's memory above the weights.
        non_torch_bytes: What is outside PyTorch.
        graph_bytes: CUDA graphs.
        taken_bytes: All that is neither weights, slots nor KV cache.
        group: Starts of one kind on one machine.
    """

    start: Start
    activation_bytes: float
    non_torch_bytes: float
    graph_bytes: float
    taken_bytes: float
    group: tuple[object, ...]


def fit_terms(startups: Sequence[Startup], begin: EstimatedTerms = FIRST_GUESS, source: str = "") -> EstimatedTerms:
    """Fit the terms to what starts logged, by robust least squares around where the fit begins.

    Starts of one model on one kind of GPU count together as the square root of their number, so that a sweep on one
    machine does not outweigh the others.

    Args:
        startups: The starts; those whose model or GPU is not known are left out.
        begin: Terms to correct: first guesses, or the bundled terms by the starts of one's own card.
        source: What the starts are, for the file.

    Raises:
        InputError: If no start tells any of the terms.
    """
    observed = [_observe(each, begin) for each in startups]
    if not any(np.isfinite(_errors(each, begin)).any() for each in observed if each is not None):
        allowed = "a start that tells activations, memory outside PyTorch or graphs"
        raise InputError("startups", f"{len(startups)} rows", allowed)
    return dataclasses.replace(_fit(observed, begin), source=source or begin.source)


def _fit(observed: Sequence[_Observation | None], begin: EstimatedTerms) -> EstimatedTerms:
    """Return the terms fitted to what was logged; where that is nothing they stay as they begin."""
    seen = [each for each in observed if each is not None]
    sizes = Counter(each.group for each in seen)
    weights = np.array([sizes[each.group] ** -0.5 for each in seen])
    names = list(_WIDTHS)
    guess, widths = (np.array([source[name] for name in names]) for source in (vars(begin), _WIDTHS))

    def terms(logarithms: Float[np.ndarray, " terms"]) -> EstimatedTerms:
        found: dict[str, Any] = dict(zip(names, map(float, guess * np.exp(logarithms)), strict=True))
        return dataclasses.replace(begin, **found)

    def residuals(logarithms: Float[np.ndarray, " terms"]) -> Float[np.ndarray, " residuals"]:
        at = terms(logarithms)
        errors = np.nan_to_num([_errors(each, at) for each in seen]) * weights[:, None]
        return np.concatenate([errors.reshape(-1), logarithms / widths])

    found = terms(least_squares(residuals, np.zeros(len(names)), loss="soft_l1").x)
    factors = [factor for each in seen if not math.isnan(factor := each.taken_bytes / _expected(each.start, found))]
    if len(factors) >= _FEWEST:
        least, most = np.percentile(np.maximum(factors, _LEAST_FACTOR), _OUTSIDE)
        found = dataclasses.replace(found, least_factor=float(min(least, 1.0)), most_factor=float(max(most, 1.0)))
    return found


def leave_out(
    startups: Sequence[Startup], kind: Callable[[Startup], str], begin: EstimatedTerms = FIRST_GUESS
) -> list[StartupPrediction]:
    """Return what is predicted of every start by terms fitted to the starts of other kinds.

    Args:
        startups: The starts.
        kind: What is left out together: the GPU's kind, or the model's family.
        begin: Where the fits begin.
    """
    seen = [(kind(each), _observe(each, begin)) for each in startups]
    terms = {left: _fit([each for other, each in seen if other != left], begin) for left in {kind for kind, _ in seen}}
    return [predict_startup(each, terms[kind(each)]) for each in startups]


def _observe(startup: Startup, terms: EstimatedTerms) -> _Observation | None:
    """Return what a start logged; None where model or GPU is not known."""
    predicted = predict_startup(startup, terms)
    if not predicted.answered:
        return None
    shape, gpu, logged = startup.shape, startup.gpu, startup.logged
    settings = startup.plan_settings(shape, gpu)
    deployment = startup.deployment
    columns = ("max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
    arrays = {name: np.array([settings[name]], np.int64) for name in columns}
    start = Start(
        startup.first_shard(shape), gpu, settings["behaviour"], deployment, block_size=settings["block_size"], **arrays
    )
    # Where a KV cache was logged in tokens only, they are of as many bytes as those predicted.
    ratio = 1 + kv_error(startup, predicted)
    kv_gib = predicted.kv_cache_gib / ratio if ratio > 0 else math.nan
    taken_bytes = _expected(start, terms) + (predicted.kv_cache_gib - kv_gib) * BYTES_PER_GIB
    graphs = logged["cuda_graph_gib"]
    return _Observation(
        start,
        logged["activation_peak_gib"] * BYTES_PER_GIB,
        max(logged["non_torch_gib"], 0.0) * BYTES_PER_GIB,
        graphs * BYTES_PER_GIB if graphs > 0 else math.nan,
        # Stages of a pipeline differ: the tokens are those of the tightest, the sizes those of the first.
        math.nan if deployment.pipeline_parallel_size > 1 else taken_bytes,
        (gpu.name, startup.model, deployment.tensor_parallel_size),
    )


def _errors(seen: _Observation, terms: EstimatedTerms) -> Float[np.ndarray, " 3"]:
    """Return the errors of the three amounts in units of what each may be off; NaN where nothing was logged."""
    activations, other, graphs = (each.item() for each in terms.amounts(seen.start, 0.5))
    return np.array(
        [
            math.log(activations / seen.activation_bytes) / _RELATIVE,
            (other - seen.non_torch_bytes) / _NON_TORCH_BYTES,
            math.log(max(graphs, 1.0) / seen.graph_bytes) / _GRAPHS if graphs else math.nan,
        ]
    )


def _expected(start: Start, terms: EstimatedTerms) -> float:
    """Return what is expected of the memory that is neither weights, slots nor KV cache, bytes."""
    return float(terms.amounts(start, 0.5).taken_bytes(start.behaviour).item())
