import math
import random
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.calibration import load_calibration
from lora_capacity.costs import step_time_s
from lora_capacity.costs.kernels import mean_rows
from lora_capacity.scenarios import Bottleneck, Results, Scenarios
from lora_capacity.status import Status
from lora_capacity.twins.steady import ResidenceTime, simulate_steady
from tests.examples import COSTS, KERNELS, LENGTHS, STAYS, STEP, make_costs, make_scenarios, simulate
from tests.reference.shared_slots import mean_wait_s

SETTLED = 2e-3
"""Relative distance from the balance of an endless horizon: the server starts empty and soon fills."""

QUADRATURE = 5e-3
"""Relative error of eight quadrature nodes in the time that an adapter stays busy."""

FLOAT32 = 2e-5
"""Relative rounding of single precision over a hundred iterations."""

PLAYED = 1.6
"""Factor between the mean wait for a slot and what playing it gives: piles are followed as means only."""

# Every token and adapter of a step counts, the rank and size of its kernels do not: the balance can be solved by hand.
PLAIN = make_costs(base_s=0.01, token_s=1.5e-4, kv_token_s=6e-8, adapter_s=2e-4)
# Three classes of adapters in every case, so that it compiles once: 60 adapters, 5.2 requests/s, with 8 slots to spare.
COUNT, RATE = [10, 20, 30], [0.2, 0.1, 0.04]


def columns(results: Results) -> dict[str, np.ndarray]:
    """All predictions by name."""
    told = {
        name: value for name, value in vars(results).items() if name not in ("client", "events", "windows", "scenarios")
    }
    return {name: np.asarray(value) for name, value in told.items()}


def numbers(results: Results) -> dict[str, np.ndarray]:
    """All predictions of the first configuration by name."""
    return {name: value[0] for name, value in columns(results).items()}


def plain_step_s(running: float, adapters: float, own: float = 0.0) -> float:
    """Step time of `PLAIN` with 250 tokens in and 200 out, by hand; ``own`` requests more than those on average."""
    tokens = running * (1 + 250 / 200) + own
    return 0.01 + 1.5e-4 * tokens + 6e-8 * 450 * (running + own) + 2e-4 * adapters


def balance_by_bisection(base_rate_per_s: float = 0.0) -> tuple[float, float, float]:
    """Step time, requests and adapters running where the batch that arrives in a stay needs just that step time.

    A request finds as many others as run on average, and makes it one more, of an adapter that is idle so many times.
    """
    classes = list(zip(COUNT, RATE, strict=True))
    offered_per_s = sum(n * rate for n, rate in classes) + base_rate_per_s

    def load(step_s: float) -> tuple[float, float, float]:
        stay_s = 200 * step_s
        active = sum(n * (1 - math.exp(-rate * stay_s)) for n, rate in classes)
        own_adapter = sum(n * rate * math.exp(-rate * stay_s) for n, rate in classes) / offered_per_s
        return offered_per_s * stay_s, active, own_adapter

    low, high = 0.0, 10.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        running, active, own_adapter = load(middle)
        seen_s = plain_step_s(running, active + own_adapter, own=1.0)
        low, high = (middle, high) if seen_s > middle else (low, middle)
    running, active, _ = load(low)
    return low, running, active


def prompts_by_hand(offered_per_s: float) -> float:
    """Time of a prompt of `PLAIN` among those that come meanwhile, of exponential lengths."""
    alone_s = 250 * 1.5e-4
    load = offered_per_s * alone_s
    return alone_s + load * alone_s * (1 + 2 * load) / (1 - load**2)


@pytest.mark.parametrize(("max_loras", "base_rate_per_s"), [(60, 0.0), (60, 3.0), (56, 0.0)])
def test_a_server_that_keeps_up_settles_where_little_s_law_and_the_step_time_meet(
    max_loras: int, base_rate_per_s: float
) -> None:
    scenarios = make_scenarios([COUNT], RATE, max_loras=max_loras, base_rate_per_s=base_rate_per_s, horizon_s=1e6)
    found = numbers(simulate(scenarios, PLAIN))
    step_s, running, adapters = balance_by_bisection(base_rate_per_s)
    offered_per_s = 5.2 + base_rate_per_s
    assert found["offered_tokens_per_s"] == pytest.approx(offered_per_s * 450, rel=FLOAT32)
    assert found["throughput_tokens_per_s"] == pytest.approx(offered_per_s * 450, rel=SETTLED)
    assert found["completed_per_s"] == pytest.approx(offered_per_s, rel=SETTLED)
    assert found["step_time_s"] == pytest.approx(step_s, rel=SETTLED)
    assert found["itl_s"] == pytest.approx(step_s, rel=SETTLED)
    assert found["mean_running"] == pytest.approx(running, rel=SETTLED)
    assert found["active_adapters"] == pytest.approx(adapters, rel=QUADRATURE)
    assert found["kv_usage"] == pytest.approx(running * 450 / 1e8, rel=SETTLED)
    assert found["mean_waiting"] == pytest.approx(0.0, abs=1e-3)
    assert found["ttft_s"] == pytest.approx(1.5 * step_s + prompts_by_hand(offered_per_s), rel=SETTLED)
    np.testing.assert_allclose(found["class_service"], 1.0, rtol=SETTLED)
    assert found["limit"] == Bottleneck.NONE


def test_prompts_that_are_cut_take_more_steps() -> None:
    whole, cut = (
        numbers(simulate(make_scenarios([COUNT], RATE, **changes), PLAIN))
        for changes in ({}, {"long_prefill_token_threshold": 50.0})
    )
    steps = 1.0 / math.expm1(50 / 250)
    assert cut["ttft_s"] - whole["ttft_s"] == pytest.approx(steps * cut["step_time_s"], rel=0.1)
    assert cut["mean_running"] > whole["mean_running"] * (1.0 + 0.5 * steps / 200)


def test_adapters_that_fit_into_the_slots_are_loaded_once() -> None:
    found = numbers(simulate(make_scenarios([COUNT], RATE, horizon_s=1e6)))
    assert found["loads_per_s"] == 0.0
    crowded = numbers(simulate(make_scenarios([COUNT], RATE, max_loras=50, horizon_s=1e6)))
    assert crowded["limit"] == Bottleneck.NONE
    assert 0.0 < crowded["loads_per_s"] < 5.2


@pytest.mark.parametrize(
    ("bound", "running", "limit"),
    [
        ({"max_num_seqs": 64}, 64.0, Bottleneck.SEQUENCES),
        ({"max_num_seqs": 128, "max_num_active_seqs": 64}, 64.0, Bottleneck.SEQUENCES),
        ({"max_num_batched_tokens": 144}, 144 / 2.25, Bottleneck.TOKEN_BUDGET),
        ({"kv_cache_tokens": 30_000}, 0.97 * 30_000 / 450, Bottleneck.KV_CACHE),
        ({"kv_cache_tokens": 30_000, "watermark_blocks": 375}, 0.8 * 30_000 / 450, Bottleneck.KV_CACHE),
    ],
)
def test_an_overloaded_server_runs_what_its_tightest_bound_allows(
    bound: dict[str, float], running: float, limit: Bottleneck
) -> None:
    scenarios = make_scenarios([COUNT], [2.0, 1.0, 0.5], horizon_s=3600.0, **bound)
    found = numbers(simulate(scenarios, make_costs(base_s=0.01, token_s=1.5e-4, kv_token_s=6e-8)))
    step_s = plain_step_s(running, 0.0)
    assert found["mean_running"] == pytest.approx(running, rel=FLOAT32)
    assert found["step_time_s"] == pytest.approx(step_s, rel=SETTLED)
    assert found["throughput_tokens_per_s"] == pytest.approx(450 * running / (200 * step_s), rel=SETTLED)
    assert found["limit"] == limit


def test_an_overloaded_server_serves_in_the_order_of_arrival() -> None:
    """Every class gets the same share, and what is not served has piled up by the end."""
    found = numbers(simulate(make_scenarios([COUNT], [2.0, 1.0, 0.5], max_num_seqs=64, horizon_s=3600.0)))
    service = found["throughput_tokens_per_s"] / found["offered_tokens_per_s"]
    assert service < 0.5
    np.testing.assert_allclose(found["class_service"], service, rtol=FLOAT32)
    # The queue grows along a line; the mean over intervals that lengthen lies up to a tenth above that over time.
    piled_up = (found["offered_tokens_per_s"] - found["throughput_tokens_per_s"]) / 450 * 3600
    assert found["mean_waiting"] == pytest.approx(piled_up / 2, rel=0.1)


@pytest.mark.parametrize("max_pending", [100.0, 1000.0])
def test_clients_that_hold_few_requests_bound_the_queue(max_pending: float) -> None:
    """With a slot for each adapter 64 run, with fewer slots fewer: the others wait."""
    scenarios = make_scenarios(
        [COUNT], [2.0, 1.0, 0.5], max_num_seqs=64, max_pending=max_pending, horizon_s=3600.0, max_loras=[60, 30]
    )
    found = simulate(scenarios)
    held = np.asarray(found.mean_waiting) + np.asarray(found.mean_running)
    assert np.all(held <= max_pending * 1.005)
    assert np.all(held >= 0.8 * max_pending)


@pytest.mark.parametrize(("max_loras", "max_pending", "played"), [(2, 32, 992.0), (3, 32, 1463.0), (2, 128, 2215.0)])
def test_clients_that_hold_less_than_a_batch_are_served_as_when_played(
    max_loras: int, max_pending: int, played: float
) -> None:
    """Seven adapters whose slots bound what runs; tokens per second as the event twin plays them, hours each."""
    lengths = {"mean_input_tokens": 232.0, "mean_output_tokens": 221.0, "kv_tokens_per_request": 342.5}
    server = {"kv_cache_tokens": 3e5, "max_num_seqs": 256, "horizon_s": 3600.0}
    scenarios = make_scenarios([[7, 0, 0]], 1.21, max_loras=max_loras, max_pending=max_pending, **lengths, **server)
    found = numbers(simulate(scenarios, load_calibration("llama-3.1-8b-instruct-h100-64gb").costs))
    assert found["throughput_tokens_per_s"] == pytest.approx(played, rel=0.25)


def test_with_fewer_slots_than_busy_adapters_all_slots_are_in_use() -> None:
    found = numbers(simulate(make_scenarios([COUNT], [2.0, 1.0, 0.5], max_loras=20, horizon_s=3600.0)))
    assert found["active_adapters"] == pytest.approx(20, rel=0.01)
    assert found["limit"] == Bottleneck.SLOTS
    assert found["loads_per_s"] > 0.0
    assert found["throughput_tokens_per_s"] < found["offered_tokens_per_s"]


@pytest.mark.parametrize("changes", [{"max_loras": 60}, {"max_loras": 30}, {"max_num_seqs": 64}, {"max_loras": 8}])
def test_requests_that_arrive_are_completed_running_or_waiting(changes: dict[str, float]) -> None:
    """What waits at the end: mean times horizon grows by the queue of the time added, which is at most 9 % too long.

    That is what 16 intervals give that lengthen with time, each told by its end, for a queue that grows along a line.
    """
    horizon_s = np.array([3600.0, 3600.0 * 1.02])
    found = simulate(make_scenarios([COUNT], [1.0, 0.5, 0.2], horizon_s=horizon_s, **changes))
    completed, waited, ran = (
        np.asarray(value, dtype=float) * horizon_s
        for value in (found.completed_per_s, found.mean_waiting, found.mean_running)
    )
    waiting, running = (np.diff(value)[0] / np.diff(horizon_s)[0] for value in (waited, ran))
    arrived = (10 * 1.0 + 20 * 0.5 + 30 * 0.2) * horizon_s.mean()
    assert completed.mean() + running + waiting / 1.09 - 0.01 * arrived < arrived
    assert completed.mean() + running + waiting + 0.01 * arrived > arrived


def test_class_services_add_up_to_the_whole() -> None:
    cases = {"max_loras": [60, 30, 8, 60], "max_num_seqs": [1e5, 1e5, 1e5, 64]}
    found = simulate(make_scenarios([COUNT], [1.0, 0.5, 0.2], horizon_s=3600.0, **cases))
    offered = np.array(COUNT) * [1.0, 0.5, 0.2]
    completed = np.asarray(found.class_service) @ offered
    np.testing.assert_allclose(completed, np.asarray(found.completed_per_s), rtol=0.01)


def test_a_server_without_adapter_traffic_serves_the_base_model() -> None:
    found = numbers(simulate(make_scenarios([[0, 0, 0]], RATE, max_loras=1, base_rate_per_s=4.0, horizon_s=1e6), PLAIN))
    step_s = balance_of_base_model()
    assert found["throughput_tokens_per_s"] == pytest.approx(4.0 * 450, rel=SETTLED)
    assert found["step_time_s"] == pytest.approx(step_s, rel=SETTLED)
    assert found["active_adapters"] == 0.0
    assert found["loads_per_s"] == 0.0
    assert np.isnan(found["class_service"]).all()
    assert all(np.isfinite(value).all() for name, value in found.items() if name != "class_service")


def balance_of_base_model() -> float:
    step_s = 0.01
    for _ in range(200):
        step_s = plain_step_s(4.0 * 200 * step_s, 0.0, own=1.0)
    return step_s


MIXED: dict[str, Any] = {
    "max_loras": [60, 30, 8, 60, 20, 60],
    "max_num_seqs": [1e5, 1e5, 1e5, 64, 128, 256],
    "max_pending": [np.inf, np.inf, np.inf, 5000.0, 2000.0, np.inf],
    "base_rate_per_s": [0.0, 1.0, 0.0, 2.0, 0.5, 0.0],
    "horizon_s": 3600.0,
}
"""Six configurations: slots to spare, few slots, hardly any, a full batch, and both with a bounded queue."""


def mixed(count: Any = COUNT, rate_per_s: Any = (1.0, 0.5, 0.2), **changes: Any) -> Scenarios:
    return make_scenarios([count], rate_per_s, **(MIXED | changes))


def assert_same(found: Results, expected: Results, rtol: float, leave_out: tuple[str, ...] = ()) -> None:
    for name, value in columns(expected).items():
        if name not in leave_out:
            np.testing.assert_allclose(getattr(found, name), value, rtol=rtol, atol=rtol, err_msg=name)


# A rounding error moves a configuration that lies on an edge; these do not, and damped iterations hardly amplify it.
ROUNDED = 2e-3


def test_padding_classes_change_nothing() -> None:
    expected = simulate(mixed())
    for rate_per_s in (0.0, 3.0):
        # One class more than the multiple of four to which the runner pads.
        more = [rate_per_s, rate_per_s]
        found = simulate(mixed([*COUNT, 0, 0], [1.0, 0.5, 0.2, *more], class_rank=[16, 16, 16, 64, 64]))
        assert_same(found, expected, ROUNDED, ("class_service",))
        assert np.isnan(np.asarray(found.class_service)[:, 3:]).all()
        np.testing.assert_allclose(np.asarray(found.class_service)[:, :3], expected.class_service, rtol=ROUNDED)


def test_a_class_in_two_parts_is_the_same_as_one() -> None:
    found = simulate(mixed([5, 20, 30, 5], [1.0, 0.5, 0.2, 1.0]))
    assert_same(found, simulate(mixed()), ROUNDED, ("class_service",))
    np.testing.assert_allclose(np.asarray(found.class_service)[:, 0], np.asarray(found.class_service)[:, 3], rtol=1e-5)


def test_the_order_of_the_classes_changes_nothing() -> None:
    found = simulate(mixed(COUNT[::-1], (0.2, 0.5, 1.0)))
    assert_same(found, simulate(mixed()), ROUNDED, ("class_service",))
    np.testing.assert_allclose(np.asarray(found.class_service)[:, ::-1], simulate(mixed()).class_service, rtol=ROUNDED)


def test_compiled_and_plain_runs_agree_and_configurations_do_not_touch_each_other() -> None:
    scenarios = mixed()
    compiled = simulate(scenarios)
    assert_same(simulate_steady(COSTS, scenarios, STAYS), compiled, 1e-3)
    alone = [simulate(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], scenarios)) for i in range(6)]
    assert_same(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *alone), compiled, 1e-3)


def test_what_does_not_start_has_no_numbers_but_what_was_offered() -> None:
    scenarios = mixed(
        status=[Status.OK, Status.NO_KV_CACHE, Status.OOM, Status.OUTSIDE_CALIBRATION, Status.OK, Status.OK]
    )
    found, all_start = simulate(scenarios), simulate(mixed())
    starts = np.array([True, False, False, True, True, True])
    for name, value in columns(found).items():
        if name not in ("offered_tokens_per_s", "status", "limit"):
            assert np.isnan(np.asarray(value)[~starts]).all(), name
            np.testing.assert_array_equal(np.asarray(value)[starts], np.asarray(getattr(all_start, name))[starts])
    np.testing.assert_array_equal(found.offered_tokens_per_s, all_start.offered_tokens_per_s)
    np.testing.assert_array_equal(found.status, scenarios.status)
    assert not np.asarray(found.starved())[~starts].any()


@pytest.mark.parametrize(
    ("count", "rate_per_s", "residence_s", "max_loras", "seed"),
    [
        ([20, 0, 0], [0.005, 1.0, 1.0], 4.0, 1, 1),
        ([10, 10, 20], [0.083, 0.05, 0.015], 3.3, 6, 2),
        ([10, 10, 20], [0.083, 0.05, 0.015], 3.3, 8, 3),
        ([60, 0, 0], [0.1, 1.0, 1.0], 4.0, 18, 4),
        ([60, 0, 0], [0.1, 1.0, 1.0], 4.0, 24, 5),
    ],
)
def test_adapters_wait_for_slots_by_chance_as_when_played(
    count: list[int], rate_per_s: list[float], residence_s: float, max_loras: int, seed: int
) -> None:
    """Steps of constant time, so that slots alone make requests wait."""
    step_s = residence_s / 200
    scenarios = make_scenarios([count], rate_per_s, max_loras=float(max_loras), horizon_s=3600.0)
    found = float(simulate(scenarios, make_costs(base_s=step_s)).ttft_s[0]) - 1.5 * step_s
    stays_s = LENGTHS.sample(np.random.default_rng(seed), 100_000) * step_s
    played = mean_wait_s(
        random.Random(seed), np.repeat(rate_per_s, count).tolist(), max_loras, stays_s.tolist(), 40_000
    )
    assert played / PLAYED < found < played * PLAYED


def test_arrivals_in_bursts_wait_longer_for_a_place_in_the_batch() -> None:
    smooth, bursty = (
        float(simulate(make_scenarios([COUNT], RATE, max_num_seqs=30, arrival_cv=cv)).ttft_s[0]) for cv in (1.0, 3.0)
    )
    assert bursty > 1.1 * smooth


def test_loads_take_time_from_the_steps() -> None:
    free = simulate(mixed(), make_costs(**STEP, **KERNELS))
    dear = simulate(mixed(), make_costs(**STEP, **KERNELS, host_to_gpu_load_s=0.02, disk_s=0.1))
    assert float(dear.itl_s[1]) > float(free.itl_s[1]) * 1.05
    assert float(dear.throughput_tokens_per_s[2]) < float(free.throughput_tokens_per_s[2])


def test_one_slot_serves_some_requests_of_every_class() -> None:
    server = {"max_loras": 1, "max_num_seqs": 19, "kv_cache_tokens": 6018.0, "kv_tokens_per_request": 694.0}
    traffic = {"mean_input_tokens": 442.0, "mean_output_tokens": 504.0, "horizon_s": 168.0, "max_pending": 787.0}
    found = numbers(simulate(make_scenarios([[60, 12, 94]], [0.15, 0.15, 5.6], max_lora_rank=64, **server, **traffic)))
    assert 0.0 < found["throughput_tokens_per_s"] < found["offered_tokens_per_s"]
    assert (found["class_service"] > 0.0).all()


def test_a_slot_for_every_adapter_never_runs_short() -> None:
    found = numbers(simulate(make_scenarios([[5, 10, 10]], 30.0, max_num_seqs=900, horizon_s=3600.0)))
    assert found["loads_per_s"] == 0.0


@pytest.mark.parametrize("kv_cache_tokens", [5300.0, 11_500.0])
def test_clients_hold_as_many_requests_as_they_may_while_the_server_is_overloaded(kv_cache_tokens: float) -> None:
    server = {"kv_cache_tokens": kv_cache_tokens, "kv_tokens_per_request": 223.0, "max_num_seqs": 666}
    traffic = {"mean_input_tokens": 220.0, "mean_output_tokens": 5.0, "horizon_s": 120.0, "max_pending": 37.0}
    found = numbers(simulate(make_scenarios([[20, 20, 39]], 4.6, **server, **traffic)))
    assert found["mean_running"] + found["mean_waiting"] == pytest.approx(37.0, rel=0.05)


INTERIOR: dict[str, Any] = {
    "max_loras": [61.0, 40.0, 20.0, 61.0, 20.0],
    "max_num_seqs": [1e5, 1e5, 1e5, 40.0, 1e5],
    "max_pending": [np.inf, np.inf, np.inf, np.inf, 800.0],
    "horizon_s": 3600.0,
}
"""Slots to spare, too few, few; a full batch; few slots and a bounded queue: away from the edges between them."""

INPUTS = ("class_rate_per_s", "mean_output_tokens", "max_loras", "base_s", "token_s", "adapter_s")


def predict(factors: jax.Array, scenarios: Scenarios, stays: ResidenceTime) -> jax.Array:
    """Logarithms of throughput, latency and step time; inputs times factors ``[inputs, configs]``."""
    rates, output, slots, *coefficients = factors
    scenarios = replace(
        scenarios,
        class_rate_per_s=scenarios.class_rate_per_s * rates[:, None],
        mean_output_tokens=scenarios.mean_output_tokens * output,
        max_loras=scenarios.max_loras * slots,
    )
    given = {name: getattr(COSTS.step, name) * factor for name, factor in zip(INPUTS[3:], coefficients, strict=True)}
    results = simulate_steady(replace(COSTS, step=replace(COSTS.step, **given)), scenarios, stays)
    return jnp.log(jnp.stack([results.throughput_tokens_per_s, results.itl_s, results.step_time_s]))


@pytest.mark.slow
def test_gradients_are_the_slopes_of_finite_differences() -> None:
    with jax.enable_x64(True):
        scenarios = make_scenarios([COUNT], [1.0, 0.5, 0.2], **INTERIOR)
        stays = ResidenceTime.of_lengths(LENGTHS)
        ones = jnp.ones((len(INPUTS), 5))
        one_of_each = jax.jit(jax.grad(lambda factors, output: predict(factors, scenarios, stays)[output].sum()))
        slopes = np.stack([one_of_each(ones, output) for output in range(3)])
        values = jax.jit(lambda factors: predict(factors, scenarios, stays))
        step = 1e-5
        moved = [[np.asarray(values(ones.at[i].add(sign * step))) for sign in (1, -1)] for i in range(len(INPUTS))]
    differences = np.stack([(up - down) / (2 * step) for up, down in moved], axis=1)
    np.testing.assert_allclose(slopes, differences, rtol=1e-4, atol=1e-5)
    # More traffic raises the throughput of a server that keeps up, one to one but for what still runs at the end;
    # dearer steps lower that of a full one.
    throughput = dict(zip(INPUTS, slopes[0], strict=True))
    assert 0.95 < throughput["class_rate_per_s"][0] < 1.0
    assert throughput["base_s"][3] < -0.1
    assert throughput["max_loras"][2] > 0.01


def test_the_step_time_told_is_that_of_the_batch_told() -> None:
    """In an overloaded server with all coefficients, whose batch stands still."""
    scenarios = make_scenarios([COUNT], [2.0, 1.0, 0.5], max_num_seqs=200, horizon_s=3600.0)
    found = numbers(simulate(scenarios, make_costs(**STEP, **KERNELS)))
    running = float(found["mean_running"])
    expected = step_time_s(
        COSTS,
        tokens=2.25 * running,
        prefill_tokens=1.25 * running,
        kv_tokens=450 * running,
        adapters=found["active_adapters"],
        skipped=0.0,
        queued=found["mean_waiting"],
        loaded=0.0,
        max_loras=60,
        max_lora_rank=16,
        rows=mean_rows(*(jnp.asarray(value) for value in (running, 0.0, running / 200, 250.0))),
    )
    assert found["step_time_s"] == pytest.approx(float(expected), rel=SETTLED)
