from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.costs import StepCosts, bare_step_time_s, step_time_s
from tests.examples import COSTS, make_costs

STEP = {
    "tokens": 200.0,
    "prefill_tokens": 150.0,
    "kv_tokens": 30_000.0,
    "adapters": 20.0,
    "skipped": 300.0,
    "queued": 700.0,
    "loaded": 90.0,
    "max_loras": 31.0,
    "max_lora_rank": 32.0,
}
SMALL = STEP | {"tokens": 60.0, "prefill_tokens": 10.0}
# What one unit of each coefficient stands for, in the two steps above, counted by hand.
UNITS = {
    "base_s": (1, 1),
    "lora_s": (1, 1),
    "token_s": (200, 60),
    "prefill_token_s": (150, 10),
    "lora_token_s": (200, 60),
    "kv_token_s": (30_000, 30_000),
    "expand_block_s": (32 * 32 * 384 * 4, 32 * 32 * 384 * 1),
    "shrink_block_s": (32 * 32 * 7 * 2 * 8 * 7, 32 * 32 * 7 * 2 * 64 * 2),
    "adapter_s": (20, 20),
    "adapter_rank_s": (20 * 32 / 8, 20 * 32),
    "skipped_request_s": (300, 300),
    "queued_request_s": (700, 700),
    "lora_listing_s": (20 * 90, 20 * 90),
    "decode_token_s": (50, 50),
    "lora_token_rank_s": (200 * 32, 60 * 32),
}


def step_s(costs: Any = COSTS, **step: float) -> float:
    return float(step_time_s(costs, **(STEP | step)))


def test_every_coefficient_is_named_here() -> None:
    assert {entry.name for entry in fields(StepCosts)} == {*UNITS, "active_block_factor", "expert_s"}


@pytest.mark.parametrize("name", UNITS)
def test_a_coefficient_adds_itself_times_what_it_is_for(name: str) -> None:
    large, small = UNITS[name]
    assert step_s(make_costs(**{name: 1.0})) == pytest.approx(large)
    assert step_s(make_costs(**{name: 1.0}), **SMALL) == pytest.approx(small)
    assert step_s(make_costs(**{name: 2.5})) == pytest.approx(2.5 * large)


def test_contributions_add_up() -> None:
    given = {name: 10.0**-place for place, name in enumerate(UNITS)}
    alone = sum(step_s(make_costs(**{name: value})) for name, value in given.items())
    assert step_s(make_costs(**given)) == pytest.approx(alone, rel=1e-6)


def test_a_share_of_small_steps_pays_so_much_of_what_the_rank_costs() -> None:
    costs = make_costs(adapter_s=1e-3, adapter_rank_s=1e-4)
    assert step_s(costs, small_share=0.25) == pytest.approx(20 * (1e-3 + 32e-4 * (0.25 + 0.75 / 8)))


def test_blocks_of_adapters_in_the_step_cost_more() -> None:
    """As if each of the 20 adapters had a quarter of a slot on top of the 32 grids."""
    large, small = UNITS["expand_block_s"]
    costs = make_costs(expand_block_s=1.0, active_block_factor=0.25)
    assert step_s(costs) == pytest.approx(large * (32 + 5) / 32)
    assert step_s(costs, **SMALL) == pytest.approx(small * (32 + 5) / 32)
    assert step_s(costs, adapters=0.0) == pytest.approx(large)


def test_a_step_of_this_size_takes_milliseconds() -> None:
    """10 ms + 200 · 40 µs + 30000 · 60 ns + 20 · (200 + 32 · 4 / 8) µs + 300 · 0.4 µs + blocks, by hand."""
    blocks_s = 32 * 32 * 384 * 4 * 1.5e-9 + 32 * 32 * 7 * 2 * 8 * 7 * 2e-10
    assert step_s() == pytest.approx(0.010 + 0.008 + 0.0018 + 0.00432 + 0.00012 + blocks_s, rel=1e-5)


def test_a_server_without_lora_pays_for_its_base_model_alone() -> None:
    without = {"adapters": 0.0, "loaded": 0.0, "skipped": 0.0, "queued": 0.0, "max_loras": 0.0}
    for name, (large, _) in UNITS.items():
        paid = 0.0 if "lora" in name or "block" in name or name.startswith(("adapter", "skip", "queue")) else large
        assert step_s(make_costs(**{name: 1.0}), **without) == pytest.approx(paid), name
    costs = make_costs(**{name: 10.0**-place for place, name in enumerate(UNITS)})
    decode = without | {"tokens": 40.0, "prefill_tokens": 0.0}
    bare_s = bare_step_time_s(costs, sequences=40.0, kv_tokens=STEP["kv_tokens"])
    assert step_s(costs, **decode) == pytest.approx(float(bare_s))


def test_no_part_shortens_a_step_and_shapes_broadcast() -> None:
    parts = {name: jnp.asarray(value) for name, value in STEP.items() if name not in ("tokens", "max_lora_rank")}
    slopes = jax.grad(lambda given: step_time_s(COSTS, **(STEP | given), small_share=0.3))(parts)
    assert all(float(slope) >= 0.0 for slope in slopes.values())
    times = step_time_s(COSTS, **(STEP | {"tokens": np.array([[1.0], [500.0]]), "adapters": np.array([0.0, 1.0, 9.0])}))
    assert times.shape == (2, 3)
    assert np.all(np.diff(times, axis=0) > 0)
    assert np.all(np.diff(times, axis=1) > 0)
