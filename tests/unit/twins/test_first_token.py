"""The law of the time to first token, against gamma and mixed laws that are known."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lora_capacity.twins.steady.balance import FirstToken
from lora_capacity.twins.steady.first_token import within

CUBE_ROOT = 0.02
"""Largest error of a share by the cube root, for laws at least as even as the exponential one."""


def law(**given: float) -> FirstToken:
    fields = dict.fromkeys(FirstToken._fields, 0.0) | {"prompt_s": 0.1, "prompt_variance_s2": 0.0025, "wait_cv2": 1.0}
    return FirstToken(**{name: jnp.full(6, value) for name, value in (fields | given).items()})


BOUNDS_S = np.array([0.02, 0.05, 0.1, 0.2, 0.5, 1.0])


def test_who_does_not_wait_takes_a_gamma_time() -> None:
    expected = stats.gamma(4.0, scale=0.025).cdf(BOUNDS_S)
    np.testing.assert_allclose(within(law(), jnp.asarray(BOUNDS_S)), expected, atol=CUBE_ROOT)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_who_waits_long_waits_an_exponential_time(share: float) -> None:
    bounds_s = BOUNDS_S * 100.0
    found = within(law(waiting_share=share, wait_s=20.0), jnp.asarray(bounds_s))
    expected = 1.0 - share * np.exp(-bounds_s / 20.0)
    np.testing.assert_allclose(found, expected, atol=CUBE_ROOT)


def test_more_time_is_enough_for_more_and_none_for_nobody() -> None:
    found = np.asarray(within(law(waiting_share=0.3, wait_s=0.5), jnp.asarray(BOUNDS_S)))
    assert np.all(np.diff(found) > 0.0)
    assert float(within(law(waiting_share=0.3), jnp.zeros(6))[0]) < CUBE_ROOT
    assert float(within(law(waiting_share=0.3), jnp.full(6, jnp.inf))[0]) == 1.0
