"""Batches hold what fits into memory and goes together."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from lora_capacity.engines import SchedulerRules
from lora_capacity.errors import InputError
from lora_capacity.run import LengthSample, simulate
from lora_capacity.run.batches import Batches, Observation, bytes_per_configuration, expected_turns
from lora_capacity.run.requests import draw_requests
from lora_capacity.scenarios import Scenarios
from lora_capacity.twins.events import RequestTables
from lora_capacity.twins.events.simulation import simulate_with_clients
from tests.examples import STAYS, make_calibration, make_scenarios

CALIBRATION = make_calibration()
MEMORY = 0.2
"""What is counted for a configuration, against what the compiler plans, which also holds intermediate values."""

INPUTS, OUTPUTS = np.array([40, 300, 500]), np.array([60, 10, 190])


def make_plan(**changes: object) -> Batches:
    given: dict[str, Any] = {
        "calibration": CALIBRATION,
        "most": np.full(100, 4096),
        "work": np.random.default_rng(0).random(100),
        "adapters": np.full(100, 31),
        "longest_output": 255,
        "at_once": 2,
        "memory_bytes": 1e12,
    }
    given |= changes
    return Batches(**{"block_size": np.full(given["most"].size, 16)} | given)


def test_every_configuration_is_in_one_batch_the_longest_first() -> None:
    plan = make_plan()
    wanted = np.arange(100) % 3 > 0
    batches = plan.cut(wanted)
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == np.flatnonzero(wanted).tolist()
    assert plan.work[rows].tolist() == sorted(plan.work[wanted], reverse=True)
    assert {(batch.width, batch.requests) for batch in batches} == {(batches[0].rows.size, batches[0].requests)}
    assert max(batch.rows.size for batch in batches) <= 16


def test_configurations_with_about_as_many_requests_go_together() -> None:
    most = np.repeat([3000, 7000, 100_000], [80, 20, 100])
    batches = make_plan(most=most, work=np.ones(200), adapters=np.full(200, 31)).cut(np.ones(200, dtype=bool))
    assert {batch.requests for batch in batches} == {4096, 2**17}
    for batch in batches:
        assert most[batch.rows].max() < batch.requests
    assert sum(batch.rows.size for batch in batches if batch.requests == 4096) == 67  # a third


def test_configurations_of_one_block_size_go_together() -> None:
    block_size = np.tile([16, 128], 50)
    batches = make_plan(block_size=block_size).cut(np.ones(100, dtype=bool))
    assert sorted(np.concatenate([batch.rows for batch in batches]).tolist()) == list(range(100))
    for batch in batches:
        assert set(block_size[batch.rows]) == {batch.block_size}


@pytest.mark.parametrize(("configs", "largest"), [(1, 1), (256, 1), (500, 2), (5000, 16)])
def test_few_configurations_keep_many_cores_busy_and_no_batch_depends_on_how_many(configs: int, largest: int) -> None:
    work = np.random.default_rng(0).random(configs)
    plan = make_plan(most=np.full(configs, 4096), work=work, adapters=np.full(configs, 31))
    few, many = (dataclasses.replace(plan, at_once=cores).cut() for cores in (1, 64))
    assert few[0].rows.size == largest
    assert [batch.rows.tolist() for batch in few] == [batch.rows.tolist() for batch in many]


@pytest.mark.parametrize("processors", [True, False])
def test_batches_fit_into_the_memory(processors: bool) -> None:
    most = np.where(np.arange(100) % 5, 4096, 2**17)
    plan = make_plan(most=most, work=most.astype(float), processors=processors)
    each = plan._bytes(2**18, 31)  # room for the next power of two
    plan = dataclasses.replace(plan, memory_bytes=2.3 * each)
    assert sum(batch.rows.size for batch in plan.cut(most > 0)) == 100
    with pytest.raises(InputError, match="requests, which fill the memory"):
        dataclasses.replace(plan, memory_bytes=1.9 * each).cut(most > 0)


@pytest.mark.slow
@pytest.mark.parametrize("load", [2.0, 20.0])
def test_the_memory_counted_is_what_the_compiler_plans(load: float) -> None:
    scenarios = make_scenarios([8.0, 8.0], [0.2 * load, 0.1 * load], max_loras=np.full(8, 4), horizon_s=300.0)
    tables = draw_requests(scenarios, INPUTS, OUTPUTS, seed=0).tables
    requests, adapters = tables.arrival.shape[1], tables.rank.shape[1]
    tables = dataclasses.replace(tables, longest_output=255)
    others = dataclasses.replace(tables, arrival=tables.arrival[:, :0])

    def simulate(scenarios: Scenarios, arrival: jax.Array, others: RequestTables) -> object:
        tables = dataclasses.replace(others, arrival=arrival)
        return simulate_with_clients(CALIBRATION.costs, scenarios, tables, SchedulerRules(), 16, 0.0, 0)

    planned = jax.jit(simulate, donate_argnums=1).lower(scenarios, tables.arrival, others).compile().memory_analysis()
    assert planned is not None
    assert planned.alias_size_in_bytes == tables.arrival.nbytes
    counted = 8 * bytes_per_configuration(requests, adapters, 255)
    total = planned.argument_size_in_bytes + planned.temp_size_in_bytes + planned.output_size_in_bytes
    total -= planned.alias_size_in_bytes
    assert counted == pytest.approx(total, rel=MEMORY)


@pytest.mark.parametrize("completed_per_s", [np.nan, -1e-3, 1e-3])
def test_tables_have_room_whatever_the_steady_twin_says(completed_per_s: float) -> None:
    scenarios = make_scenarios([[8]], [0.5], max_pending=50.0)
    steady = simulate(CALIBRATION, scenarios, STAYS, engine="steady")
    wrong: Any = dataclasses.replace(steady, completed_per_s=np.full_like(steady.completed_per_s, completed_per_s))
    plan = Batches.plan(CALIBRATION, jax.tree.map(np.asarray, scenarios), wrong, 255, Observation())
    assert 50 < plan.most[0] <= 1024  # doubled until they hold all that arrive, hence soon enough
    assert plan.with_longer_tables(np.ones(1, dtype=bool)).most.tolist() == (2 * plan.most).tolist()


@pytest.mark.slow
def test_the_turns_expected_are_about_those_taken() -> None:
    adapters = np.array([4, 8, 12, 16, 24, 32, 12, 24])
    scenarios = make_scenarios(
        np.stack([adapters / 2, adapters / 2], axis=1),
        [0.8, 0.3],
        max_loras=[4, 4, 2, 16, 8, 2, 12, 1],
        max_num_seqs=[256, 256, 256, 256, 16, 256, 4, 256],
        kv_cache_tokens=2e5,
        mean_input_tokens=INPUTS.mean(),
        mean_output_tokens=OUTPUTS.mean(),
        horizon_s=300.0,
        max_pending=500.0,
    )
    expected = expected_turns(jax.tree.map(np.asarray, scenarios), simulate(CALIBRATION, scenarios, STAYS))
    turns = simulate(CALIBRATION, scenarios, LengthSample(INPUTS, OUTPUTS), engine="event").events.iterations
    # The twin for processors admits within a step, so that a full server takes up to half as many turns.
    np.testing.assert_allclose(np.log(expected / turns), 0.0, atol=0.7)
