"""The event twin for processors: what it looks up, and more requests at a time than it has room for."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from lora_capacity.costs import Costs, LoadCosts, LoraKernels, StepCosts, step_time_s
from lora_capacity.engines import SchedulerRules
from lora_capacity.run import compiled
from lora_capacity.run.requests import draw_requests
from lora_capacity.twins.compiled import simulate_server
from tests.examples import make_calibration, make_scenarios

RNG = np.random.default_rng(0)
INPUTS, OUTPUTS = np.array([40, 300, 500]), np.array([60, 10, 190])


def drawn_costs(kernels: LoraKernels) -> Costs:
    """Return costs in which no coefficient is 0, so that none can be forgotten."""
    groups = [
        kind(**{field.name: float(RNG.uniform(1e-6, 2e-6)) for field in dataclasses.fields(kind)})
        for kind in (StepCosts, LoadCosts)
    ]
    return Costs(step=groups[0], loads=groups[1], kernels=kernels)


def server_of(costs: Costs, **settings: Any) -> tuple[Any, Any]:
    scenarios = make_scenarios([[8.0]], [0.5], max_loras=4.0, horizon_s=60.0, **settings)
    tables = draw_requests(scenarios, INPUTS, OUTPUTS, seed=0).tables
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], (scenarios, tables))


def test_steps_looked_up_take_what_the_costs_say() -> None:
    costs = drawn_costs(make_calibration().costs.kernels)
    scenario, tables = server_of(costs)
    server = compiled.build_server(costs, scenario, tables, SchedulerRules())
    n = server.numbers[0]
    for tokens, adapters in ((1, 0), (127, 1), (128, 3), (int(scenario.max_num_batched_tokens), 8)):
        prompt, held, skipped, queued = RNG.integers(0, tokens + 1, size=4).tolist()
        step = server.steps[tokens]
        looked_up_s = step["fixed_s"] + step["grid_s"] * server.adapters["grids"][adapters]
        looked_up_s += step["adapter_s"] * adapters + n["prompt_token_s"] * prompt + n["kv_token_s"] * held
        looked_up_s += n["skipped_request_s"] * skipped + n["queued_request_s"] * queued
        right_s = step_time_s(
            costs,
            tokens=float(tokens),
            prefill_tokens=float(prompt),
            kv_tokens=float(held),
            adapters=float(adapters),
            skipped=float(skipped),
            queued=float(queued),
            loaded=8.0,
            max_loras=float(scenario.max_loras),
            max_lora_rank=float(scenario.max_lora_rank),
        )
        assert looked_up_s == pytest.approx(float(right_s), rel=1e-5)


def test_a_server_with_too_few_entries_says_so_and_is_run_again_with_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = make_calibration()
    scenario, tables = server_of(calibration.costs, mean_output_tokens=100.0)
    few, enough = (
        compiled.build_server(calibration.costs, scenario, tables, SchedulerRules(), entries=entries)
        for entries in (2, 1000)
    )
    assert not simulate_server(few)
    assert simulate_server(enough)
    build = compiled.build_server
    monkeypatch.setattr(
        compiled, "build_server", lambda *given, entries=0, **more: build(*given, entries=entries or 2, **more)
    )
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[np.newaxis], (scenario, tables))
    found, _ = compiled.run_compiled(
        calibration.costs, one[0], one[1], [[0]], SchedulerRules(), warmup_s=0.0, samples=0
    )
    assert float(found.completed_per_s[0]) == pytest.approx(enough.totals[0]["requests"] / 60.0)
