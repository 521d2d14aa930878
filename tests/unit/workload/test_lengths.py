import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.workload import LengthDistribution


@pytest.mark.parametrize(
    ("mean", "std", "minimum", "maximum"),
    [
        pytest.param(223, 248, 4, 1024, id="chat prompts"),
        pytest.param(197, 207, 4, 1024, id="chat answers"),
        pytest.param(220, 20, 4, 1024, id="narrow"),
        pytest.param(220, 1e-3, 4, 1024, id="nearly one length"),
        pytest.param(220.5, 0.5001, 4, 1024, id="nearly two neighbours"),
        pytest.param(220, 294.45, 4, 1024, id="uniform-like spread"),
        pytest.param(220, 416, 4, 1024, id="nearly both ends"),
        pytest.param(900, 200, 4, 1024, id="skewed to the left"),
        pytest.param(3000, 5000, 1, 131072, id="long context"),
        pytest.param(2, 0.5, 1, 3, id="three lengths"),
        pytest.param(1.5, 0.5, 1, 2, id="two lengths"),
    ],
)
def test_moments_are_met(mean: float, std: float, minimum: int, maximum: int) -> None:
    lengths = LengthDistribution.from_moments(mean, std, minimum, maximum)
    assert lengths.mean == pytest.approx(mean, rel=1e-9)
    assert lengths.std == pytest.approx(std, rel=1e-6)
    assert lengths.second_moment == pytest.approx(mean**2 + std**2, rel=1e-6)
    assert minimum <= lengths.min <= lengths.max <= maximum


def test_chat_lengths_are_skewed_to_the_right() -> None:
    lengths = LengthDistribution.from_moments(223, 248, 4, 1024)
    assert float(lengths.probability @ (lengths.tokens - lengths.mean) ** 3) > lengths.std**3
    assert np.all(np.diff(lengths.probability) < 0)


def test_std_of_zero_is_one_length() -> None:
    lengths = LengthDistribution.from_moments(220, 0, 4, 1024)
    assert lengths.tokens.tolist() == [220]
    assert (lengths.min, lengths.max, lengths.std) == (220, 220, 0)
    assert LengthDistribution.from_moments(7, 0, 7, 7).tokens.tolist() == [7]


def test_largest_std_is_both_ends() -> None:
    ends = LengthDistribution.from_moments(4, 27**0.5, 1, 13)
    assert ends.tokens.tolist() == [1, 13]
    assert ends.probability == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ((220, 500, 4, 1024), "x.std: 500.0 is not allowed; allowed: 0 to 416.73 for a mean of 220 between 4 and 1024"),
        ((220.5, 0, 4, 1024), "x.std: 0.0 is not allowed; allowed: 0.5 to .*; a std of 0 needs a whole mean"),
        ((220, -1, 4, 1024), "x.std: -1 is not allowed; allowed: a number >= 0"),
        ((220, float("nan"), 4, 1024), "x.std: nan is not allowed"),
        ((3, 1, 4, 1024), "x.mean: 3 is not allowed; allowed: a number >= 4 and <= 1024"),
        ((2000, 1, 4, 1024), "x.mean: 2000 is not allowed; allowed: a number >= 4 and <= 1024"),
        ((4, 1, 4, 1024), "x.std: 1.0 is not allowed; allowed: 0 to 0 "),
        ((220, 10, 1024, 4), r"x.min: 1024 is not allowed; allowed: a whole number from 1 to max \(4\)"),
        ((220, 10, 0, 1024), "x.min: 0 is not allowed; allowed: a whole number >= 1"),
        ((220, 10, 4.5, 1024), "x.min: 4.5 is not allowed; allowed: a whole number >= 1"),
        ((220, 10, 4, 10**7), "x.max: 10000000 is not allowed; allowed: a whole number >= 1 and <= 1000000"),
        ((220, "10", 4, 1024), "x.std: '10' is not allowed; allowed: a number >= 0"),
    ],
)
def test_impossible_moments_are_told(moments: tuple[float, float, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LengthDistribution.from_moments(*moments, field="x")


def test_histogram_is_sorted_merged_and_normalised() -> None:
    lengths = LengthDistribution.from_histogram([30, 10, 30, 20, 40], [1, 4, 2, 1, 0])
    assert lengths.tokens.tolist() == [10, 20, 30]
    assert lengths.probability == pytest.approx([0.5, 0.125, 0.375])
    assert lengths.mean == pytest.approx(18.75)


@pytest.mark.parametrize(
    ("tokens", "weights", "message"),
    [
        ([], [], "h, tokens: 'an empty list' is not allowed; allowed: a list of at least one whole number"),
        ([0], [1], r"h, tokens\[0\]: 0"),
        ([1, 2.5], [1, 1], r"h, tokens\[1\]: 2.5 is not allowed; allowed: a whole number >= 1"),
        ([1], [-1], r"h, weight\[0\]: -1"),
        ([1, 2], [0, 0], "h, weight: 0 is not allowed; allowed: at least one weight > 0"),
        ([1, 2], [1], "h, weight: '1 weights' is not allowed; allowed: 2, one per length"),
        ([10**7], [1], "h, tokens: 10000000 is not allowed; allowed: whole numbers from 1 to 1000000"),
    ],
)
def test_bad_histograms_are_told(tokens: list[float], weights: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LengthDistribution.from_histogram(tokens, weights, field="h")


@pytest.mark.parametrize(
    ("tokens", "probability", "field"),
    [
        ([2, 1], [0.5, 0.5], "tokens"),
        ([1, 1], [0.5, 0.5], "tokens"),
        ([0, 1], [0.5, 0.5], "tokens"),
        ([], [], "tokens"),
        ([1, 2], [0.5, 0.6], "probability"),
        ([1, 2], [1.5, -0.5], "probability"),
        ([1, 2], [float("nan"), 1.0], "probability"),
        ([1, 2], [1.0], "probability"),
    ],
)
def test_what_is_no_distribution_is_refused(tokens: list[int], probability: list[float], field: str) -> None:
    with pytest.raises(InputError) as caught:
        LengthDistribution(np.array(tokens), np.array(probability))
    assert caught.value.field == field


def test_samples_follow_the_distribution() -> None:
    lengths = LengthDistribution.from_histogram([4, 100, 1024], [1, 2, 1])
    drawn = lengths.sample(np.random.default_rng(3), 40_000)
    assert drawn.dtype == np.int32
    share = [np.mean(drawn == tokens) for tokens in lengths.tokens]
    # Four standard errors of a share of 0.5 in 40,000 draws.
    assert share == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_lengths_cannot_be_written_to_and_copy_their_input() -> None:
    tokens, probability = np.array([1, 2]), np.array([0.5, 0.5])
    lengths = LengthDistribution(tokens, probability)
    tokens[0] = 99
    assert lengths.tokens.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        lengths.probability[0] = 1.0
