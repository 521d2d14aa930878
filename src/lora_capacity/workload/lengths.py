"""Lengths of prompts and outputs: a probability for every whole number of tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from lora_capacity.errors import InputError, check_number
from lora_capacity.schema import Number, check_numbers
from lora_capacity.workload._fields import MAX_TOKENS, FloatArray, Int32Array, IntArray, read_only

_WHOLE = 1e-8
"""Relative distance within which a mean counts as a whole number: what lies closer cannot be told apart in the sums."""

_EDGE = 2e-7
"""Relative distance from the least or largest possible std within which the limiting two-point form is used."""

_NO_SPREAD_TOKENS = 1e-4
"""Standard deviation of a whole mean below which all is one length: rounding in the sums would drown it."""


@dataclass(frozen=True, eq=False)
class LengthDistribution:
    """A distribution over whole numbers of tokens.

    Attributes:
        tokens: The possible lengths in tokens, ascending, int64 ``[lengths]``.
        probability: The probability of each, float64 ``[lengths]``; sums to 1.

    Raises:
        InputError: If the lengths are not ascending whole numbers >= 1 or the probabilities do not sum to 1.
    """

    tokens: IntArray
    probability: FloatArray

    def __post_init__(self) -> None:
        tokens, probability = read_only(self.tokens, np.int64), read_only(self.probability, np.float64)
        if (
            tokens.ndim != 1
            or not tokens.size
            or tokens[0] < 1
            or tokens[-1] > MAX_TOKENS
            or np.any(np.diff(tokens) < 1)
        ):
            raise InputError("tokens", "other values", f"ascending whole numbers from 1 to {MAX_TOKENS}")
        # 1e-9: what rounding leaves in the sum of a million probabilities, far below any share that counts.
        if probability.shape != tokens.shape or not np.all(probability >= 0) or abs(probability.sum() - 1.0) > 1e-9:
            raise InputError("probability", "other values", f"{tokens.size} numbers >= 0 that sum to 1")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "probability", probability)

    @classmethod
    def from_moments(cls, mean: float, std: float, minimum: int, maximum: int, *, field: str = "lengths") -> Self:
        """Return the discrete truncated gamma distribution of a given mean and standard deviation.

        The probability of a length is p(x) ∝ x^(k-1) · exp(-x/θ) on the whole numbers ``minimum`` to ``maximum``,
        with k and 1/θ of either sign. On a bounded support this is the exponential family of the statistics (log x,
        x), so for every k exactly one θ gives the mean. Along that line a larger k gives a smaller variance (the
        ratio of two members of equal mean is log-concave, hence one is smaller in convex order): from all mass at the
        two ends (k -> -∞) to all mass at the two whole numbers next to the mean (k -> ∞). These are the largest and
        the smallest variance that any distribution on these lengths has, so *every* attainable pair is reached, by
        one member, found with two nested one-dimensional searches. Lengths of chat prompts and outputs are skewed to
        the right, as members with small k are; those of a normal family are not.

        Args:
            mean: Mean length in tokens, within the bounds.
            std: Standard deviation in tokens; 0 stands for a single length, which must be whole.
            minimum: Shortest length in tokens, >= 1.
            maximum: Longest length in tokens, <= 1,000,000.
            field: Where the four stand, for the message.

        Returns:
            A distribution whose mean and std are those given, to 1e-6 relative.

        Raises:
            InputError: If no distribution within the bounds has this mean and std; the message gives the range of std.
        """
        low = int(check_number(f"{field}.min", minimum, minimum=1, maximum=MAX_TOKENS, integer=True))
        high = int(check_number(f"{field}.max", maximum, minimum=1, maximum=MAX_TOKENS, integer=True))
        if low > high:
            raise InputError(f"{field}.min", low, f"a whole number from 1 to max ({high})")
        mean = check_number(f"{field}.mean", mean, minimum=low, maximum=high)
        std = check_number(f"{field}.std", std, minimum=0)
        if math.isclose(mean, round(mean), rel_tol=_WHOLE):
            mean = float(round(mean))
        part = mean - math.floor(mean)
        least, most = math.sqrt(part * (1.0 - part)), math.sqrt((mean - low) * (high - mean))
        if not least * (1.0 - _EDGE) <= std <= most * (1.0 + _EDGE):
            remedy = "a std of 0 needs a whole mean" if std == 0 else ""
            allowed = f"{least:.6g} to {most:.6g} for a mean of {mean:g} between {low} and {high}"
            raise InputError(f"{field}.std", std, allowed, remedy)
        if std <= max(least * (1.0 + _EDGE), _NO_SPREAD_TOKENS):
            return cls._two_points(math.floor(mean), math.ceil(mean), mean)
        if std >= most * (1.0 - _EDGE):
            return cls._two_points(low, high, mean)
        tokens = np.arange(low, high + 1)
        return cls(tokens, _solve(tokens.astype(np.float64), mean, std))

    @classmethod
    def from_histogram(cls, tokens: ArrayLike, weights: ArrayLike, *, field: str = "histogram") -> Self:
        """Return the distribution of a table of lengths.

        Args:
            tokens: Lengths in tokens, whole numbers >= 1, in any order, ``[rows]``; repeated ones are added up.
            weights: How often each occurs, or any multiple of that, >= 0, ``[rows]``.
            field: Where the table stands, for the message.

        Raises:
            InputError: If a length or weight is not such a number, or all weights are 0.
        """
        lengths = check_numbers(f"{field}, tokens", np.asarray(tokens), Number(minimum=1), whole=True)
        weight = check_numbers(f"{field}, weight", np.asarray(weights), Number(minimum=0))
        if lengths.shape != weight.shape:
            raise InputError(f"{field}, weight", f"{weight.size} weights", f"{lengths.size}, one per length")
        if lengths.max() > MAX_TOKENS:
            raise InputError(f"{field}, tokens", int(lengths.max()), f"whole numbers from 1 to {MAX_TOKENS}")
        if not weight.any():
            raise InputError(f"{field}, weight", 0, "at least one weight > 0")
        occurs = weight > 0
        distinct, place = np.unique(lengths[occurs].astype(np.int64), return_inverse=True)
        total = np.bincount(place, weights=weight[occurs] / weight.max())
        return cls(distinct, total / total.sum())

    @classmethod
    def _two_points(cls, low: int, high: int, mean: float) -> Self:
        if low == high:
            return cls(np.array([low]), np.array([1.0]))
        share = (mean - low) / (high - low)
        return cls(np.array([low, high]), np.array([1.0 - share, share]))

    @property
    def mean(self) -> float:
        """Mean length in tokens."""
        return float(self.probability @ self.tokens)

    @property
    def second_moment(self) -> float:
        """Mean of the squared length in tokens²."""
        return float(self.probability @ self.tokens.astype(np.float64) ** 2)

    @property
    def std(self) -> float:
        """Standard deviation of the length in tokens."""
        return math.sqrt(float(self.probability @ (self.tokens - self.mean) ** 2))

    @property
    def min(self) -> int:
        """Shortest length in tokens."""
        return int(self.tokens[0])

    @property
    def max(self) -> int:
        """Longest length in tokens."""
        return int(self.tokens[-1])

    def sample(self, rng: np.random.Generator, count: int) -> Int[np.ndarray, " {count}"]:
        """Draw independent lengths by inversion; one uniform number is used up per length.

        Args:
            rng: Source of randomness; advanced.
            count: How many to draw.

        Returns:
            Lengths in tokens, int32 ``[count]``.
        """
        cumulative = np.cumsum(self.probability)
        place = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
        lengths: Int32Array = self.tokens[np.minimum(place, self.tokens.size - 1)].astype(np.int32)
        return lengths


def _solve(tokens: Float[np.ndarray, " lengths"], mean: float, std: float) -> Float[np.ndarray, " lengths"]:
    """Return the member of the family with this mean and std, which must lie strictly inside the attainable range.

    The exponent is written as shape · bend(x) + slope · tilt(x): ``bend`` is log x less its tangent at the mean, so
    that the two parameters hardly disturb each other and large shapes do not cancel.
    """
    deviation = tokens - mean
    bend = np.log1p(deviation / mean) - deviation / mean
    tilt = deviation / (tokens[-1] - tokens[0])
    end_ratio = math.log((mean - tokens[0]) / (tokens[-1] - mean))

    def member(shape: float) -> Float[np.ndarray, " lengths"]:
        bent = shape * bend

        def weights(slope: float) -> Float[np.ndarray, " lengths"]:
            exponent = bent + slope * tilt
            weight: FloatArray = np.exp(exponent - exponent.max())
            return weight

        # A U-shaped member (shape < 0) has about its mean when its two ends alone have it.
        guess = end_ratio - (bent[-1] - bent[0]) if shape < 0 else 0.0
        weight = weights(_root(lambda slope: float(weights(slope) @ tilt), guess))
        probability: FloatArray = weight / weight.sum()
        return probability

    def excess(position: float) -> float:
        return std - math.sqrt(float(member(scale * math.sinh(position)) @ deviation**2))

    scale = (mean / std) ** 2  # the shape of an untruncated gamma distribution
    return member(scale * math.sinh(_root(excess, 0.0)))


def _root(increasing: Callable[[float], float], guess: float) -> float:
    """Return where an increasing function crosses zero, bracketing it outwards from a guess."""
    low = high = guess
    width = 1.0
    while increasing(low) > 0:
        low, high, width = low - width, low, 2 * width
    while increasing(high) < 0:
        low, high, width = high, high + width, 2 * width
    # As close as double precision tells apart: `_EDGE` and the accuracy promised rest on it.
    return low if low == high else float(brentq(increasing, low, high, xtol=1e-13, rtol=1e-15, maxiter=500))
