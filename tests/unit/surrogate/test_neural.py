import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.surrogate import NeuralSurrogate, SurrogateInputs, train_neural
from lora_capacity.surrogate.simulation import simulate_workloads

pytestmark = pytest.mark.slow

STEPS = 300
NUDGE = 0.03


@pytest.fixture(scope="module")
def smooth(calibration, labels) -> NeuralSurrogate:
    return train_neural(calibration, labels, steps=STEPS)


def best_servers(labels, share: float):
    """WorkloadBatch with their best slots and as many adapters as send a share of what these sustain."""
    workloads, slots = labels.workloads, labels.optima.max_loras
    load = share * labels.optima.sustained_per_s - workloads.base_rate_per_s
    return workloads, np.maximum(load / workloads.rates_per_s.mean(axis=1), slots + 1.0), slots


def gradient(smooth, calibration, inputs, what: str):
    def log_throughput(nudge):
        changed = dataclasses.replace(inputs, **{what: getattr(inputs, what) * jnp.exp(nudge)})
        return jnp.log(smooth.predict(calibration.costs, changed).throughput_tokens_per_s).sum()

    return np.asarray(jax.grad(log_throughput)(jnp.zeros(inputs.max_loras.shape)))


@pytest.mark.parametrize(("share", "bound"), [(0.6, 0.1), (1.3, 0.35)])
def test_more_requests_are_worth_what_the_twin_says(smooth, calibration, labels, share, bound):
    workloads, adapters, slots = best_servers(labels, share)
    inputs = SurrogateInputs.of(calibration, workloads, adapters, slots)
    ours = gradient(smooth, calibration, inputs, "rates_per_s")

    def twin(factor: float):
        faster = dataclasses.replace(workloads, rates_per_s=workloads.rates_per_s * factor)
        return np.log(simulate_workloads(calibration, faster, adapters, slots).throughput_tokens_per_s)

    theirs = (twin(np.exp(NUDGE)) - twin(np.exp(-NUDGE))) / (2 * NUDGE)
    assert np.median(np.abs(ours - theirs)) < bound


def test_well_below_capacity_throughput_is_what_is_offered(smooth, calibration, labels):
    found = smooth.predict(calibration.costs, SurrogateInputs.of(calibration, *best_servers(labels, 0.5)))
    share = np.asarray(found.throughput_tokens_per_s / found.offered_tokens_per_s)
    assert np.median(share) > 0.98
    assert np.median(np.asarray(found.margin)) > 0.4


def test_every_gradient_is_finite_on_both_sides_of_capacity(smooth, calibration, labels):
    for share in (0.5, 1.0, 2.0):
        inputs = SurrogateInputs.of(calibration, *best_servers(labels, share))

        def margin(inputs):
            return smooth.predict(calibration.costs, inputs).margin.sum()

        for leaf in jax.tree.leaves(jax.grad(margin)(inputs)):
            assert np.all(np.isfinite(np.asarray(leaf)))


def test_a_file_gives_it_back_and_changed_ones_are_refused(smooth, calibration, labels, tmp_path):
    path = tmp_path / "smooth.json"
    smooth.write(path)
    content = json.loads(path.read_text("utf-8"))
    again = NeuralSurrogate.from_json(content)
    inputs = SurrogateInputs.of(calibration, *best_servers(labels, 0.9))
    np.testing.assert_allclose(
        again.predict(calibration.costs, inputs).margin, smooth.predict(calibration.costs, inputs).margin, atol=1e-3
    )
    with pytest.raises(InputError, match="it was changed"):
        NeuralSurrogate.from_json(content | {"mean": [0.0]})
    with pytest.raises(InputError, match="schema_version: 99"):
        NeuralSurrogate.from_json(content | {"schema_version": 99})
    with pytest.raises(InputError, match="a smooth surrogate"):
        NeuralSurrogate.from_json({})


def test_sensitivities_are_the_slopes_of_what_is_predicted(smooth, calibration, labels):
    workload = labels.workloads.take([0])
    slots = int(labels.optima.max_loras[0])
    adapters = int(1.2 * labels.optima.max_cpu_loras[0])
    found = smooth.assess(calibration, workload, adapters, slots)
    rates = [dataclasses.replace(workload, rates_per_s=workload.rates_per_s * np.exp(side)) for side in (-0.01, 0.01)]
    rates = [
        dataclasses.replace(each, base_rate_per_s=workload.base_rate_per_s * np.exp(s))
        for each, s in zip(rates, (-0.01, 0.01), strict=True)
    ]
    low, high = (smooth.assess(calibration, each, adapters, slots) for each in rates)
    slope = np.log(high["throughput_tokens_per_s"] / low["throughput_tokens_per_s"]) / 0.02
    assert found["sensitivities"]["rates"]["log_throughput"] == pytest.approx(slope, abs=0.01)
    slope = (high["margin"] - low["margin"]) / 0.02
    assert found["sensitivities"]["rates"]["margin"] == pytest.approx(slope, abs=0.01)
    with pytest.raises(InputError, match="max_loras: 9"):
        smooth.assess(calibration, workload, 8, 9)
    with pytest.raises(InputError, match=r"of llama-3\.1-8b-instruct-h100-64gb"):
        smooth.assess(dataclasses.replace(calibration, name="other"), workload, adapters, slots)


def test_a_round_of_another_length_means_the_same(smooth, calibration, labels):
    workload = labels.workloads.take([0])
    twice = dataclasses.replace(
        workload, rates_per_s=np.tile(workload.rates_per_s, 2), ranks=np.tile(workload.ranks, 2)
    )
    one, two = (smooth.assess(calibration, each, 60, 12) for each in (workload, twice))
    assert two["throughput_tokens_per_s"] == pytest.approx(one["throughput_tokens_per_s"], rel=1e-5)
    assert two["margin"] == pytest.approx(one["margin"], abs=1e-5)
