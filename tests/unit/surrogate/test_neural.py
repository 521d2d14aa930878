import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.surrogate import Smooth, SmoothInputs, train_smooth
from lora_capacity.surrogate.steady import simulate_questions

STEPS = 300
NUDGE = 0.03


@pytest.fixture(scope="module")
def smooth(calibration, labels) -> Smooth:
    return train_smooth(calibration, labels, steps=STEPS)


def best_servers(labels, share: float):
    """Questions with their best slots and as many adapters as send a share of what these sustain."""
    questions, slots = labels.questions, labels.optima.max_loras
    load = share * labels.optima.sustained_per_s - questions.base_rate_per_s
    return questions, np.maximum(load / questions.rates_per_s.mean(axis=1), slots + 1.0), slots


def gradient(smooth, calibration, inputs, what: str):
    def log_throughput(nudge):
        changed = dataclasses.replace(inputs, **{what: getattr(inputs, what) * jnp.exp(nudge)})
        return jnp.log(smooth.predict(calibration.costs, changed).throughput_tokens_per_s).sum()

    return np.asarray(jax.grad(log_throughput)(jnp.zeros(inputs.max_loras.shape)))


@pytest.mark.parametrize(("share", "bound"), [(0.6, 0.1), (1.3, 0.35)])
def test_more_requests_are_worth_what_the_twin_says(smooth, calibration, labels, share, bound):
    questions, adapters, slots = best_servers(labels, share)
    inputs = SmoothInputs.of(calibration, questions, adapters, slots)
    ours = gradient(smooth, calibration, inputs, "rates_per_s")

    def twin(factor: float):
        faster = dataclasses.replace(questions, rates_per_s=questions.rates_per_s * factor)
        return np.log(simulate_questions(calibration, faster, adapters, slots).throughput_tokens_per_s)

    theirs = (twin(np.exp(NUDGE)) - twin(np.exp(-NUDGE))) / (2 * NUDGE)
    assert np.median(np.abs(ours - theirs)) < bound


def test_well_below_capacity_throughput_is_what_is_offered(smooth, calibration, labels):
    found = smooth.predict(calibration.costs, SmoothInputs.of(calibration, *best_servers(labels, 0.5)))
    share = np.asarray(found.throughput_tokens_per_s / found.offered_tokens_per_s)
    assert np.median(share) > 0.98
    assert np.median(np.asarray(found.margin)) > 0.4


def test_every_gradient_is_finite_on_both_sides_of_capacity(smooth, calibration, labels):
    for share in (0.5, 1.0, 2.0):
        inputs = SmoothInputs.of(calibration, *best_servers(labels, share))

        def margin(inputs):
            return smooth.predict(calibration.costs, inputs).margin.sum()

        for leaf in jax.tree.leaves(jax.grad(margin)(inputs)):
            assert np.all(np.isfinite(np.asarray(leaf)))


def test_a_file_gives_it_back_and_changed_ones_are_refused(smooth, calibration, labels, tmp_path):
    path = tmp_path / "smooth.json"
    smooth.write(path)
    content = json.loads(path.read_text("utf-8"))
    again = Smooth.from_json(content)
    inputs = SmoothInputs.of(calibration, *best_servers(labels, 0.9))
    np.testing.assert_allclose(
        again.predict(calibration.costs, inputs).margin, smooth.predict(calibration.costs, inputs).margin, atol=1e-3
    )
    with pytest.raises(InputError, match="it was changed"):
        Smooth.from_json(content | {"mean": [0.0]})
    with pytest.raises(InputError, match="schema_version: 99"):
        Smooth.from_json(content | {"schema_version": 99})
    with pytest.raises(InputError, match="a smooth surrogate"):
        Smooth.from_json({})
