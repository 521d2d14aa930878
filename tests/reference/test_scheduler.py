"""The reference scheduler against cases small enough to be worked out by hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_capacity.twins.reference import AdapterTiers, Behaviour, Config, Simulation, StepState, simulate
from lora_capacity.workload import BASE_MODEL, Requests

ROOMY = Config(max_num_seqs=8, max_num_batched_tokens=64, max_loras=4, max_cpu_loras=8, kv_blocks=64)
ASYNC = Behaviour(async_scheduling=True)


def requests(*rows: tuple[float, int, int, int]) -> Requests:
    """Rows of arrival, adapter, input and output tokens."""
    return Requests(*(np.array(column) for column in zip(*rows, strict=True)))


def one_second(_: StepState) -> float:
    return 1.0


def scheduled(result: Simulation) -> list[dict[int, int]]:
    return [step.state.scheduled for step in result.steps]


def test_prompt_in_chunks_then_a_token_a_step() -> None:
    config = replace(ROOMY, max_num_batched_tokens=10)
    result = simulate(requests((0.5, 0, 25, 3)), config, one_second)
    assert scheduled(result) == [{0: 10}, {0: 10}, {0: 5}, {0: 1}, {0: 1}]
    assert [step.state.blocks_used for step in result.steps] == [1, 2, 2, 2, 2]
    assert [step.state.kv_tokens for step in result.steps] == [10, 20, 25, 26, 27]
    assert [step.finished for step in result.steps] == [(), (), (), (), (0,)]
    assert (result.sent_s[0], result.first_token_s[0], result.finished_s[0]) == (0.5, 3.5, 5.5)


def test_running_requests_come_before_waiting_ones_in_the_token_budget() -> None:
    config = replace(ROOMY, max_num_batched_tokens=10)
    result = simulate(requests((0, 0, 4, 9), (0, 1, 12, 2), (0, 2, 4, 1)), config, one_second)
    assert scheduled(result)[:4] == [{0: 4, 1: 6}, {0: 1, 1: 6, 2: 3}, {0: 1, 1: 1, 2: 1}, {0: 1}]


def test_max_num_seqs_bounds_the_batch_and_ends_the_search() -> None:
    config = replace(ROOMY, max_num_seqs=2, max_loras=1)
    result = simulate(requests((0, 0, 1, 2), (0, 1, 1, 1), (0, 0, 1, 2), (0, 1, 1, 1)), config, one_second)
    assert scheduled(result) == [{0: 1, 2: 1}, {0: 1, 2: 1}, {1: 1, 3: 1}]
    assert [step.state.skipped for step in result.steps] == [1, 0, 0]


def test_requests_without_a_slot_are_skipped_and_keep_their_order() -> None:
    rows = [(0, 0, 1, 3), (0, 1, 1, 1), (0, 2, 1, 1), (0, 0, 1, 1), (0, BASE_MODEL, 1, 1), (0, 1, 1, 1)]
    result = simulate(requests(*rows), replace(ROOMY, max_loras=1), one_second)
    assert scheduled(result) == [{0: 1, 3: 1, 4: 1}, {0: 1}, {0: 1}, {1: 1, 5: 1}, {2: 1}]
    assert [step.state.skipped for step in result.steps] == [3, 3, 3, 1, 0]
    assert [step.state.adapters for step in result.steps] == [(0,), (0,), (0,), (1,), (2,)]


def test_order_of_requests_skipped_can_be_turned_round() -> None:
    rows = requests((0, 0, 1, 1), (0, 1, 1, 1), (0, 2, 1, 1), (0, 3, 1, 1))
    config = replace(ROOMY, max_loras=1)
    assert scheduled(simulate(rows, config, one_second)) == [{0: 1}, {1: 1}, {2: 1}, {3: 1}]
    reverse = replace(config, behaviour=Behaviour(skipped="reverse"))
    assert scheduled(simulate(rows, reverse, one_second)) == [{0: 1}, {3: 1}, {1: 1}, {2: 1}]


@pytest.mark.parametrize(("skipped", "first"), [("keep", 1), ("ahead", 2)])
def test_requests_skipped_can_go_ahead_of_the_preempted(skipped: Literal["keep", "ahead"], first: int) -> None:
    # 2 is skipped in the first step, 1 preempted in the second; nobody finds a block before 0 is finished.
    rows = requests((0, BASE_MODEL, 16, 9), (0, 0, 16, 9), (0, 1, 1, 1))
    config = replace(ROOMY, max_loras=1, kv_blocks=2, behaviour=Behaviour(skipped=skipped))
    result = simulate(rows, config, one_second)
    assert scheduled(result)[:2] == [{0: 16, 1: 16}, {0: 1}]
    assert [step.state.waiting for step in result.steps[:9]] == [1] + [2] * 8
    assert next(iter(scheduled(result)[9])) == first


def test_last_running_request_gives_its_blocks_up_and_starts_over() -> None:
    config = replace(ROOMY, kv_blocks=3)
    result = simulate(requests((0, 0, 16, 4), (0, 1, 16, 4), (0, 2, 1, 1)), config, one_second)
    assert scheduled(result)[:5] == [{0: 16, 1: 16, 2: 1}, {0: 1}, {0: 1}, {0: 1}, {1: 17}]
    assert [step.state.preempted for step in result.steps][:3] == [(), (1,), ()]
    assert [step.state.blocks_used for step in result.steps][:3] == [3, 2, 2]
    assert result.first_token_s[1] == 1.0


def test_no_admission_in_a_step_that_preempted() -> None:
    config = replace(ROOMY, kv_blocks=4)
    result = simulate(requests((0, 0, 32, 3), (0, 0, 32, 3), (1, 1, 1, 1)), config, one_second)
    assert result.steps[1].state.preempted == (1,)
    assert [step.state.waiting for step in result.steps][:2] == [0, 2]
    assert scheduled(result)[1] == {0: 1}


def test_a_request_can_be_the_last_one_itself() -> None:
    result = simulate(requests((0, 0, 16, 1), (0, 1, 16, 3)), replace(ROOMY, kv_blocks=2), one_second)
    assert scheduled(result) == [{0: 16, 1: 16}, {1: 1}, {1: 1}]
    result = simulate(requests((0, 0, 31, 9), (0, 1, 16, 3)), replace(ROOMY, kv_blocks=3), one_second)
    assert scheduled(result)[:2] == [{0: 31, 1: 16}, {0: 1}]
    assert result.steps[1].state.preempted == (1,)


def test_waiting_request_without_blocks_stops_those_behind_it() -> None:
    result = simulate(requests((0, 0, 32, 2), (0, 1, 32, 1), (0, 2, 1, 1)), replace(ROOMY, kv_blocks=4), one_second)
    assert scheduled(result)[0] == {0: 32, 1: 32}
    result = simulate(requests((0, 0, 32, 2), (0, 1, 17, 1), (0, 2, 1, 1)), replace(ROOMY, kv_blocks=3), one_second)
    assert scheduled(result) == [{0: 32}, {0: 1}, {1: 17, 2: 1}]


def test_whole_prompt_must_fit_where_the_version_asks_for_it() -> None:
    config = replace(ROOMY, kv_blocks=4, max_num_batched_tokens=48)
    rows = requests((0, 0, 32, 4), (0, 1, 48, 1))
    loose = simulate(rows, config, one_second)
    assert scheduled(loose)[:2] == [{0: 32, 1: 16}, {0: 1}]
    assert loose.steps[1].state.preempted == (1,)
    strict = replace(config, behaviour=Behaviour(full_prompt_must_fit=True))
    assert scheduled(simulate(rows, strict, one_second)) == [{0: 32}, {0: 1}, {0: 1}, {0: 1}, {1: 48}]


def test_watermark_keeps_blocks_free_unless_nothing_runs() -> None:
    config = replace(ROOMY, kv_blocks=4, watermark_blocks=2)
    result = simulate(requests((0, 0, 48, 1), (0, 0, 16, 1), (0, 0, 16, 1)), config, one_second)
    assert scheduled(result) == [{0: 48}, {1: 16, 2: 16}]
    assert scheduled(simulate(requests((0, 0, 17, 1), (0, 0, 1, 1)), config, one_second)) == [{0: 17}, {1: 1}]


def test_clients_hold_back_what_exceeds_max_pending() -> None:
    rows = requests((0, 0, 1, 2), (0.5, 1, 1, 3), (0.6, 2, 1, 1), (0.7, 3, 1, 1))
    result = simulate(rows, ROOMY, one_second, max_pending=2)
    assert scheduled(result) == [{0: 1}, {0: 1, 1: 1}, {1: 1, 2: 1}, {1: 1, 3: 1}]
    np.testing.assert_array_equal(result.sent_s, [0, 0.5, 2, 3])
    np.testing.assert_array_equal(result.finished_s, [2, 4, 3, 4])


def test_horizon_ends_scheduling_but_not_the_step_under_way() -> None:
    result = simulate(requests((0, 0, 1, 9), (5, 0, 1, 1)), ROOMY, one_second, horizon_s=2.5)
    assert [step.end_s for step in result.steps] == [1, 2, 3]
    assert np.isnan(result.finished_s).all()
    assert np.isnan(result.sent_s[1])
    rows = requests((0, 0, 1, 9), (0, 0, 1, 1))
    assert len(simulate(rows, ROOMY, one_second, horizon_s=2.0, max_pending=1).steps) == 2


def test_request_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="request 0 needs 3 KV blocks"):
        simulate(requests((0, 0, 30, 4)), replace(ROOMY, kv_blocks=2), one_second)


def test_adapters_are_read_from_disk_once_and_kept_in_host_memory() -> None:
    config = replace(ROOMY, max_loras=1, max_cpu_loras=2)
    result = simulate(requests(*((float(i), a, 1, 1) for i, a in enumerate((5, 6, 5, 7, 6, 5, 5)))), config, one_second)
    assert [step.state.host_loads for step in result.steps] == [(5,), (6,), (5,), (7,), (6,), (5,), ()]
    assert [step.state.disk_loads for step in result.steps] == [(5,), (6,), (), (7,), (6,), (5,), ()]


def test_newcomer_pushes_out_an_adapter_of_the_same_step() -> None:
    config = replace(ROOMY, max_loras=2)
    rows = requests((0, 1, 1, 3), (1, 2, 1, 1), (2, 0, 1, 1))
    # 0 comes first and takes the place of 1, the least recently used, which comes back in the place of 2.
    assert [step.state.host_loads for step in simulate(rows, config, one_second).steps] == [(1,), (2,), (0, 1)]
    last = replace(config, touch_order=(1, 2, 0))
    assert [step.state.host_loads for step in simulate(rows, last, one_second).steps] == [(1,), (2,), (0,)]


def test_eviction_from_host_memory_takes_the_slot_too() -> None:
    tiers = AdapterTiers(max_loras=2, max_cpu_loras=2)
    assert [tiers.touch(adapter) for adapter in (1, 2, 1, 3)] == [
        (True, True),
        (True, True),
        (False, False),
        (True, True),
    ]
    assert (tiers.gpu, tiers.host) == ([1, 3], [1, 3])


def test_step_time_sees_the_step_and_sets_the_clock() -> None:
    result = simulate(
        requests((0, 0, 3, 2), (0.2, 1, 5, 1)), ROOMY, lambda step: 0.1 * step.tokens + len(step.disk_loads)
    )
    assert [step.start_s for step in result.steps] == [0, 1.3]
    assert [step.end_s for step in result.steps] == pytest.approx([1.3, 1.3 + 1.6], abs=1e-12)


def test_asynchronous_scheduling_keeps_the_finished_one_step_longer() -> None:
    rows = requests((0, 0, 1, 4), (0, 1, 16, 1), (0, 2, 1, 1))
    config = replace(ROOMY, max_num_seqs=2)
    assert scheduled(simulate(rows, config, one_second)) == [{0: 1, 1: 16}, {0: 1, 2: 1}, {0: 1}, {0: 1}]
    result = simulate(rows, replace(config, behaviour=ASYNC), one_second)
    assert scheduled(result) == [{0: 1, 1: 16}, {0: 1}, {0: 1, 2: 1}, {0: 1}]
    assert [step.state.blocks_used for step in result.steps] == [2, 2, 2, 2]
    # What is scheduled while nothing but last tokens are on their way is empty, and no step.
    alone = simulate(rows, replace(config, max_num_seqs=1, behaviour=ASYNC), one_second)
    assert scheduled(alone) == [{0: 1}] * 4 + [{1: 16}, {2: 1}]
    assert [step.start_s for step in alone.steps] == [0, 1, 2, 3, 4, 5]


def test_asynchronous_scheduling_sees_arrivals_a_step_later() -> None:
    rows = requests((0, 0, 1, 4), (0.5, 1, 1, 1))
    assert scheduled(simulate(rows, ROOMY, one_second)) == [{0: 1}, {0: 1, 1: 1}, {0: 1}, {0: 1}]
    result = simulate(rows, replace(ROOMY, behaviour=ASYNC), one_second)
    assert scheduled(result) == [{0: 1}, {0: 1}, {0: 1, 1: 1}, {0: 1}]
    np.testing.assert_array_equal(result.finished_s, [4, 3])


def test_adapters_of_finishing_requests_are_in_use_in_later_versions() -> None:
    config = replace(ROOMY, max_loras=1, behaviour=ASYNC)
    rows = requests((0, BASE_MODEL, 1, 4), (0, 0, 1, 1), (0, 1, 1, 1))
    assert scheduled(simulate(rows, config, one_second)) == [{0: 1, 1: 1}, {0: 1, 2: 1}, {0: 1}, {0: 1}]
    later = replace(config, behaviour=replace(ASYNC, running_adapters_in_use=True))
    assert scheduled(simulate(rows, later, one_second)) == [{0: 1, 1: 1}, {0: 1}, {0: 1, 2: 1}, {0: 1}]


@st.composite
def servers(draw: st.DrawFn) -> tuple[Requests, Config, int | None]:
    """Small servers, short of everything."""
    count = draw(st.integers(1, 25))
    columns: Sequence[list[int]] = [
        draw(st.lists(values, min_size=count, max_size=count))
        for values in (st.integers(0, 6), st.integers(-1, 5), st.integers(1, 40), st.integers(1, 40))
    ]
    gaps, adapter, inputs, outputs = columns
    max_loras = draw(st.integers(1, 4))
    config = Config(
        max_num_seqs=draw(st.integers(1, 12)),
        max_num_batched_tokens=draw(st.integers(12, 50)),
        max_loras=max_loras,
        max_cpu_loras=max_loras + draw(st.integers(0, 3)),
        kv_blocks=draw(st.integers(5, 20)),
        watermark_blocks=draw(st.integers(0, 1)),
        touch_order=tuple(draw(st.permutations(range(6)))),
        behaviour=Behaviour(
            running_adapters_in_use=draw(st.booleans()),
            full_prompt_must_fit=draw(st.booleans()),
            async_scheduling=draw(st.booleans()),
            skipped=draw(st.sampled_from(["keep", "reverse", "ahead"])),
        ),
    )
    rows = Requests(np.cumsum(gaps), *(np.array(column) for column in (adapter, inputs, outputs)))
    return rows, config, draw(st.sampled_from([None, 1, 5]))


@given(servers())
def test_bounds_hold_and_every_request_is_served(case: tuple[Requests, Config, int | None]) -> None:
    rows, config, max_pending = case
    result = simulate(rows, config, one_second, max_pending=max_pending)
    assert np.isfinite(result.finished_s).all()
    assert (rows.arrival_s <= result.sent_s).all()
    assert (result.sent_s < result.first_token_s).all()
    assert (result.first_token_s <= result.finished_s).all()
    assert sorted(number for step in result.steps for number in step.finished) == list(range(len(rows)))
    tokens = np.zeros(len(rows), np.int64)
    for step in result.steps:
        state = step.state
        assert state.tokens <= config.max_num_batched_tokens
        assert state.blocks_used <= config.kv_blocks
        assert state.running <= config.max_num_seqs
        assert len(state.adapters) <= config.max_loras
        assert set(state.disk_loads) <= set(state.host_loads) <= set(state.adapters)
        assert max_pending is None or state.running + state.waiting <= max_pending
        tokens[list(state.sampling)] += 1
    np.testing.assert_array_equal(tokens, rows.output_tokens)


def sharing(shared: Sequence[int], *rows: tuple[float, int, int, int]) -> Requests:
    """Rows as above, and the tokens that each shares with the others of its adapter."""
    return replace(requests(*rows), shared_prefix_tokens=np.array(shared))


CACHING = replace(ROOMY, prefix_caching=True)


def found(result: Simulation) -> list[dict[int, int]]:
    return [step.state.found for step in result.steps]


def test_blocks_of_a_shared_prefix_are_found_by_its_own_adapter_only() -> None:
    rows = [(0, 0, 40, 2), (0, 0, 50, 2), (0, 1, 50, 1), (0, BASE_MODEL, 50, 1)]
    result = simulate(sharing([40, 40, 40, 40], *rows), replace(CACHING, max_num_batched_tokens=500), one_second)
    # Two whole blocks of 16 are found, in the very step that computes them.
    assert found(result) == [{1: 32}, {}]
    assert scheduled(result) == [{0: 40, 1: 18, 2: 50, 3: 50}, {0: 1, 1: 1}]
    # 3 + 2 of its own + 4 + 4: what is shared is counted once.
    assert result.steps[0].state.blocks_used == 13
    assert result.steps[0].state.kv_tokens == 40 + 50 + 50 + 50


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    result = simulate(sharing([32, 32], (0, 0, 32, 1), (1, 0, 32, 1)), CACHING, one_second)
    assert found(result) == [{}, {1: 16}]
    assert scheduled(result) == [{0: 32}, {1: 16}]


def test_blocks_are_taken_again_in_the_order_in_which_they_were_freed_and_the_last_of_a_request_first() -> None:
    rows = [(0, 0, 33, 1), (1, 1, 33, 1), (2, 2, 17, 1), (3, 0, 40, 1), (4, 1, 40, 1)]
    config = replace(CACHING, kv_blocks=6, max_num_batched_tokens=100)
    result = simulate(sharing([32, 32, 0, 32, 32], *rows), config, one_second)
    # The six blocks are freed as (last, second, first) of adapter 0, then of 1; the third request takes two of them,
    # which leaves the first block of adapter 0; the fourth holds that one and takes two of adapter 1's.
    assert found(result) == [{}, {}, {}, {3: 16}, {4: 16}]


@pytest.mark.parametrize(("uncached_first", "hits"), [(False, 16), (True, 32)])
def test_a_block_that_is_not_full_is_taken_first_in_newer_versions(uncached_first: bool, hits: int) -> None:
    config = replace(CACHING, kv_blocks=6, max_num_batched_tokens=100)
    config = replace(config, behaviour=Behaviour(uncached_first=uncached_first))
    rows = [(0, 0, 33, 1), (1, 1, 33, 1), (2, 2, 32, 1), (3, 0, 40, 1)]
    result = simulate(sharing([32, 32, 0, 32], *rows), config, one_second)
    # The third request takes two blocks: the last two of the first request, or the last ones of the first and second.
    assert found(result) == [{}, {}, {}, {3: hits}]


def test_a_preempted_request_finds_what_is_left_of_its_own_blocks() -> None:
    config = replace(CACHING, max_num_seqs=2, kv_blocks=5, max_num_batched_tokens=100)
    rows = [(0, 0, 30, 20), (0, 0, 30, 12)]
    cached = simulate(requests(*rows), config, one_second)
    plain = simulate(requests(*rows), replace(config, prefix_caching=False), one_second)
    assert [step.state.preempted for step in cached.steps] == [step.state.preempted for step in plain.steps]
    (preempting,) = (step for step, _ in enumerate(plain.steps) if plain.steps[step].state.preempted)
    again = next(step for step in range(preempting + 1, len(plain.steps)) if 1 in scheduled(plain)[step])
    assert found(cached)[again] == {1: 16}
    assert scheduled(cached)[again][1] == scheduled(plain)[again][1] - 16
