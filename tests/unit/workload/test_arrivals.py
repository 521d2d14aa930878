import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.workload import Arrivals

PROCESSES = [Arrivals(), Arrivals("gamma", 0.5), Arrivals("gamma", 2.0)]


def draw(arrivals: Arrivals, rate_per_s: float, horizon_s: float, seed: int) -> np.ndarray:
    return arrivals.sample(np.random.default_rng(seed), rate_per_s, horizon_s)


@pytest.mark.parametrize("arrivals", PROCESSES)
def test_gaps_have_the_mean_and_cv_asked_for(arrivals: Arrivals) -> None:
    gap_s = np.diff(draw(arrivals, 5.0, 20_000.0, seed=1))
    error = arrivals.cv / np.sqrt(gap_s.size)
    assert gap_s.mean() == pytest.approx(0.2, rel=4 * error)
    assert gap_s.std() / gap_s.mean() == pytest.approx(arrivals.cv, rel=0.05)


@pytest.mark.parametrize("arrivals", PROCESSES)
def test_the_start_is_stationary(arrivals: Arrivals) -> None:
    # A stationary process has rate · width arrivals on average in every window; one that starts with a gap has not.
    rate_per_s, streams = 0.5, 4000
    times_s = np.concatenate([draw(arrivals, rate_per_s, 8.0, seed=seed) for seed in range(streams)])
    per_window = np.histogram(times_s, bins=8, range=(0, 8))[0] / streams
    # Counts in a window of half a gap vary by less than (1 + cv²) / 2 · mean; five standard errors over eight windows.
    error = np.sqrt(rate_per_s * (1 + arrivals.cv**2) / 2 / streams)
    assert per_window == pytest.approx(rate_per_s, abs=5 * error)


@pytest.mark.parametrize("arrivals", PROCESSES)
def test_a_longer_horizon_only_adds(arrivals: Arrivals) -> None:
    short, long = draw(arrivals, 2.0, 100.0, seed=5), draw(arrivals, 2.0, 150.0, seed=5)
    assert short.size < long.size
    assert long[: short.size].tolist() == short.tolist()


@pytest.mark.parametrize("arrivals", [*PROCESSES, Arrivals("gamma", 0.001), Arrivals("gamma", 100)])
@pytest.mark.parametrize("rate_per_s", [1e-9, 0.01, 50.0])
def test_arrivals_are_sorted_and_within_the_horizon(arrivals: Arrivals, rate_per_s: float) -> None:
    for seed in range(20):
        times_s = draw(arrivals, rate_per_s, 60.0, seed)
        assert np.all(np.diff(times_s) >= 0)
        assert np.all((times_s >= 0) & (times_s < 60.0))


@pytest.mark.parametrize(
    ("process", "cv", "message"),
    [
        (
            "poison",
            1.0,
            "arrivals.process: 'poison' is not allowed; allowed: poisson, gamma, trace; did you mean 'poisson'",
        ),
        (3, 1.0, "arrivals.process: 3 is not allowed"),
        (
            "poisson",
            2.0,
            "arrivals.cv: 2.0 is not allowed; allowed: 1 for poisson; write process: gamma to choose a cv",
        ),
        ("gamma", 0.0, "arrivals.cv: 0.0 is not allowed; allowed: a number >= 0.001 and <= 100"),
        ("gamma", -1.0, "arrivals.cv: -1.0 is not allowed"),
        ("gamma", 1e9, "arrivals.cv: 1000000000.0 is not allowed"),
        ("gamma", float("nan"), "arrivals.cv: nan is not allowed"),
        ("gamma", "2", "arrivals.cv: '2' is not allowed"),
    ],
)
def test_bad_processes_are_told(process: str, cv: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Arrivals(process, cv)


def test_a_trace_is_not_drawn() -> None:
    with pytest.raises(InputError, match="a trace has its own arrivals"):
        draw(Arrivals("trace", 1.3), 1.0, 1.0, seed=0)
