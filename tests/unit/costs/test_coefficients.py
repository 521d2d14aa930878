from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import pytest

from lora_capacity.costs import COEFFICIENTS, Costs, FrontEndCosts, LoadCosts, StepCosts
from lora_capacity.fitting.priors import fitted_names, priors
from lora_capacity.measurements import read_profile
from tests.examples import COSTS, LLAMA_8B

PROFILE = Path(__file__).parents[2] / "data" / "profile-cpu"
ONLY_GPU = {"prefill_token_s", "expand_block_s", "shrink_block_s", "adapter_rank_s", "active_block_factor"}
ONLY_GPU |= {"queued_request_s", "lora_listing_s"}
ONLY_CPU = {"decode_token_s", "lora_token_rank_s"}
JUST_TOLD = {"disk_s", "disk_rank_s", "metrics_interval_s", "expert_s"}
"""Measured directly, told by the user, or only ever derived."""


def test_every_coefficient_says_what_it_is() -> None:
    assert [each.name for each in COEFFICIENTS] == [
        entry.name for cls in (StepCosts, LoadCosts, FrontEndCosts) for entry in fields(cls)
    ]
    for each in COEFFICIENTS:
        assert each.meaning.endswith(".")
        assert each.unit == ("1" if each.name == "active_block_factor" else "s")


def test_devices_differ_in_their_coefficients() -> None:
    front_end = {entry.name for entry in fields(FrontEndCosts)} - JUST_TOLD
    engine = {each.name for each in COEFFICIENTS} - JUST_TOLD - front_end
    assert set(fitted_names("gpu")) == engine - ONLY_CPU
    assert set(fitted_names("cpu")) == engine - ONLY_GPU
    assert all(set(fitted_names(device, of_front_end=True)) == front_end for device in ("gpu", "cpu"))


def test_costs_are_put_into_place_by_name() -> None:
    values = {each.name: float(i + 1) for i, each in enumerate(COEFFICIENTS)}
    costs = Costs.of_model(LLAMA_8B, values)
    assert {**vars(costs.step), **vars(costs.loads), **vars(costs.front_end)} == values
    nothing = Costs.of_model(LLAMA_8B, {})
    assert set(jax.tree.leaves((nothing.step, nothing.loads, nothing.front_end))) == {0.0}
    assert costs.kernels == COSTS.kernels


def test_costs_are_given_by_name_only() -> None:
    """A field that moves must not change what stands for what."""
    makers: tuple[Any, ...] = (StepCosts, LoadCosts, Costs)
    for make in makers:
        with pytest.raises(TypeError):
            make(0.01, 0.02, 0.03)


def test_priors_of_a_cpu_are_of_the_order_of_its_own_steps() -> None:
    profile = read_profile(PROFILE)
    believed = priors(profile)
    assert set(believed) == {*fitted_names("cpu"), *fitted_names("cpu", of_front_end=True)}
    assert all(prior.centre > 0 and prior.spread > 0 for prior in believed.values())
    assert believed["base_s"].centre < profile.decode["step_s"].max()
    # Two bytes a value of each key and value, at 20 GB/s.
    assert believed["kv_token_s"].centre == profile.model.kv_bytes_per_token / 2e10
