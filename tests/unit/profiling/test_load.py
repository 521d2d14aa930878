import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from lora_capacity_profiling.endpoint import Endpoint
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.load import LoadResult, RequestOutcome, at_once, run_load
from lora_capacity_profiling.server import Server

from lora_capacity.errors import InputError
from lora_capacity.workload import Goodput
from lora_capacity.workload.requests import Requests
from tests.unit.profiling.conftest import fake_state
from tests.unit.profiling.test_server import wait_until

Launch = Callable[..., Server]
COMPLETED, FAILED = RequestOutcome.COMPLETED, RequestOutcome.FAILED


def load(server: Server, requests: Requests, **options: Any) -> LoadResult:
    return run_load(server.endpoint, requests, ["a0", "a1"], base_model="fake", **{"duration_s": 60.0, **options})


def test_open_loop_sends_what_it_should_when_it_should(launch: Launch) -> None:
    server = launch(step_s=0.002)
    requests = Requests(
        np.array([0.0, 0.05, 0.05, 0.3]), np.array([0, 1, -1, 0]), np.array([5, 700, 1, 17]), np.array([4, 1, 9, 2])
    )
    result = load(server, requests, record_pieces=True)
    assert result.outcome.tolist() == [COMPLETED] * 4
    assert result.due_s.tolist() == requests.arrival_s.tolist()
    assert np.all(result.lag_s >= 0)
    assert np.all(result.sent_s < result.first_token_s)
    assert [each.size for each in result.piece_s] == [4, 1, 9, 2]
    assert [each[0] for each in result.piece_s] == result.first_token_s.tolist()
    assert [each[-1] for each in result.piece_s] == result.last_token_s.tolist()
    assert result.itl_s.size == 3 + 8 + 1
    bodies = sorted(fake_state(server.endpoint)["bodies"], key=lambda body: body["max_tokens"])
    assert [(body["model"], body["prompt"], body["max_tokens"]) for body in bodies] == [
        ("a1", 700, 1),
        ("a0", 17, 2),
        ("a0", 5, 4),
        ("fake", 1, 9),
    ]
    assert all(body["ignore_eos"] and body["stream"] for body in bodies)
    assert all(3 <= body["least"] <= body["most"] < 1000 for body in bodies)


def test_prompts_begin_alike_for_as_long_as_they_share_a_prefix(launch: Launch) -> None:
    server = launch(step_s=0.001)
    three = at_once(np.array([0, 0, 1]), np.full(3, 20), np.array([1, 2, 3]))
    load(server, replace(three, shared_prefix_tokens=np.array([4, 4, 0])))
    bodies = sorted(fake_state(server.endpoint)["bodies"], key=lambda body: body["max_tokens"])
    first, second, third = (body["begin"] for body in bodies)
    assert [body["prompt"] for body in bodies] == [20, 20, 20]
    assert first[:4] == second[:4] != third[:4]
    assert first[4] != second[4]


def test_closed_loop_keeps_so_many_under_way_over_as_many_connections(launch: Launch) -> None:
    server = launch(step_s=0.001)
    before = fake_state(server.endpoint)["connections"]
    result = load(server, at_once(np.arange(60) % 3 - 1, np.full(60, 10), np.full(60, 5)), max_pending=7)
    state = fake_state(server.endpoint)
    assert result.completed.all()
    assert state["most_running"] == 7
    assert state["connections"] == before + 1 + 7  # one more to ask for the state
    assert result.piece_s == ()


def test_max_pending_holds_requests_back_in_order(launch: Launch) -> None:
    server = launch(step_s=0.02)
    result = load(server, at_once(np.zeros(12), np.full(12, 3), np.full(12, 5)), max_pending=3)
    assert fake_state(server.endpoint)["most_running"] == 3
    assert np.all(np.diff(result.sent_s) > 0)
    assert np.all(result.due_s[3:] > 0)
    ends = np.sort(result.last_token_s)
    assert np.all(result.sent_s[3:] > ends[:9])  # the fourth is sent when the first has ended


def test_run_that_is_over_cancels_what_is_left(launch: Launch) -> None:
    server = launch(step_s=0.05)
    arrivals_s = np.array([0.0, 0.0, 0.1, 5000.0])
    requests = Requests(arrivals_s, np.zeros(4), np.full(4, 3), np.array([2, 100_000, 100_000, 1]))
    told = []
    result = load(server, requests, duration_s=3.0, on_progress=lambda *numbers: told.append(numbers))
    assert [RequestOutcome(each).name for each in result.outcome] == [
        "COMPLETED",
        "UNFINISHED",
        "UNFINISHED",
        "NOT_SENT",
    ]
    assert result.duration_s >= 3.0
    assert told
    assert np.isnan(result.sent_s[3])
    assert result.summary()["arrivals"] == 3
    assert wait_until(lambda: fake_state(server.endpoint)["running"] == 0)  # the server was told, too


def test_request_that_fails_is_recorded_and_passed_over(launch: Launch) -> None:
    server = launch()
    requests = at_once([0, 1, 0, 1], np.full(4, 3), np.full(4, 2))
    result = run_load(server.endpoint, requests, ["a0", "gone"], base_model="fake", duration_s=60)
    assert result.outcome.tolist() == [COMPLETED, FAILED, COMPLETED, FAILED]
    assert result.failures == {"the server answered 404: The model `gone` does not exist.": 2}


def test_answer_that_breaks_off_is_a_failure(launch: Launch) -> None:
    result = load(launch("breaks"), at_once([0, 0], [3, 3], [2, 5]))
    assert result.outcome.tolist() == [COMPLETED, FAILED]
    assert result.failures == {"the server closed the connection before the answer was complete": 1}


def test_server_that_keeps_no_connection_costs_no_request(launch: Launch) -> None:
    result = load(launch("closes"), at_once(np.zeros(200), np.full(200, 3), np.full(200, 2)), max_pending=4)
    assert result.failures == {}
    assert result.completed.all()


def test_server_that_answers_errors_only_ends_the_run_with_one_line(launch: Launch) -> None:
    elsewhere = replace(launch().endpoint, prefix="/elsewhere")
    with pytest.raises(ServerError, match=r"20 requests in a row failed; the last: the server answered 404"):
        run_load(
            elsewhere, at_once(np.zeros(500), np.ones(500), np.ones(500)), ["a0"], base_model="fake", duration_s=60
        )


def test_server_that_dies_midway_ends_the_run_with_one_line_and_says_so(launch: Launch) -> None:
    server = launch("dies", dies_at=30, step_s=0.01)
    requests = at_once(np.zeros(500), np.full(500, 3), np.full(500, 100_000))
    with pytest.raises(ServerError, match=r"20 requests in a row failed; the last: (the server closed|no connection)"):
        load(server, requests, max_pending=30)
    assert wait_until(lambda: not server.running)
    with pytest.raises(ServerError, match=r"died with exit code 3 \(failed\): RuntimeError: the engine fell over"):
        server.check()


def test_interrupt_ends_the_run(launch: Launch) -> None:
    server = launch(step_s=0.05)

    def interrupt(elapsed_s: float, sent: int, ended: int) -> None:
        if sent:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        load(server, at_once(np.zeros(20), np.full(20, 3), np.full(20, 1000)), on_progress=interrupt)
    assert wait_until(lambda: fake_state(server.endpoint)["running"] == 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"requests": at_once([2], [1], [1])}, "requests.adapter: 2 is not allowed; allowed: -1 to 1"),
        ({"requests": at_once([], [], [])}, "at least one request"),
        ({"duration_s": 0}, "duration_s: 0 is not allowed"),
        ({"max_pending": 0}, "max_pending: 0 is not allowed"),
        ({"requests": at_once(np.zeros(10**7), np.ones(10**7), np.ones(10**7))}, "see ulimit -n"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], text: str) -> None:
    arguments = {"requests": at_once([0], [1], [1]), "duration_s": 1.0, **change}
    with pytest.raises(InputError) as error:
        run_load(Endpoint("127.0.0.1", 1), models=["a0", "a1"], base_model="fake", **arguments)
    assert text in str(error.value)


def test_summary_by_hand() -> None:
    nan = np.nan
    result = LoadResult(
        requests=Requests(np.zeros(4), np.zeros(4), np.array([10, 20, 30, 40]), np.array([3, 1, 6, 8])),
        outcome=np.array([COMPLETED, COMPLETED, COMPLETED, RequestOutcome.UNFINISHED]),
        due_s=np.zeros(4),
        sent_s=np.array([1.0, 2.0, 3.0, 4.0]),
        first_token_s=np.array([1.5, 2.25, 3.75, nan]),
        last_token_s=np.array([1.9, 2.25, 4.25, nan]),
        piece_s=tuple(map(np.array, ([1.5, 1.7, 1.9], [2.25], [3.75, 4.25], []))),
        duration_s=10.0,
        cpu_s=0.1,
    )
    summary = result.summary()
    expected = {
        "mean_input_tokens": 25,
        "mean_output_tokens": 4.5,
        "std_input_tokens": np.std([10, 20, 30, 40]),
        "std_output_tokens": np.std([3, 1, 6, 8]),
        "max_output_tokens": 8,
        "arrivals": 4,
        "completed": 3,
        "duration_s": 10,
        "completed_input_tokens": 60,
        "completed_output_tokens": 10,
        "input_throughput": 6,
        "output_throughput": 1,
        "mean_ttft_ms": 500,
        "median_ttft_ms": 500,
        "p99_ttft_ms": 745,
        "mean_tpot_ms": 150,
        "median_tpot_ms": 150,
        "p99_tpot_ms": 199,
        "mean_itl_ms": 900 / 7,
        "median_itl_ms": 200,
        "p99_itl_ms": 494,
    }
    assert summary == pytest.approx(expected)


def test_attainment_by_hand() -> None:
    """Of six requests one comes after the run; of the five, one failed and one never had a first token."""
    nan = np.nan
    sent = np.array([0.0, 1.0, 2.0, 3.0, 4.0, nan])
    result = LoadResult(
        requests=Requests(np.array([0.0, 1, 2, 3, 4, 11]), np.zeros(6), np.full(6, 10), np.array([1, 5, 5, 5, 5, 5])),
        outcome=np.array([COMPLETED, COMPLETED, COMPLETED, RequestOutcome.FAILED, RequestOutcome.UNFINISHED, 0]),
        due_s=sent,
        sent_s=sent,
        first_token_s=sent + np.array([0.2, 0.2, 0.4, 0.2, nan, nan]),
        last_token_s=sent + np.array([0.2, 1.0, 0.8, 1.0, nan, nan]),
        piece_s=(),
        duration_s=10.0,
        cpu_s=0.1,
    )
    bounds = [{"ttft": 500}, {"ttft": 300}, {"ttft": 500, "tpot": 150}, {"e2el": 900}, {"ttft": 100}]
    kept = [result.attainment(Goodput.from_ms(each)) for each in bounds]
    assert kept == pytest.approx([3 / 5, 2 / 5, 2 / 5, 2 / 5, 0.0])


def test_summary_of_a_run_in_which_nothing_was_completed() -> None:
    one = np.full(1, np.nan)
    requests = at_once([0], [10], [3])
    result = LoadResult(requests, np.zeros(1, np.int64), one, one, one, one, (), 10.0, 0.1)
    summary = result.summary()
    assert (summary["completed"], summary["arrivals"], summary["output_throughput"]) == (0, 0, 0)
    assert np.isnan([summary[f"{share}_{name}_ms"] for share in ("mean", "p99") for name in ("ttft", "itl")]).all()


def test_overhead_of_the_client_is_measured(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    fast, paced = launch(), launch(step_s=0.005)
    short = load(fast, at_once(np.zeros(2000), np.full(2000, 200), np.full(2000, 1)), max_pending=32)
    long = load(fast, at_once(np.zeros(200), np.full(200, 200), np.full(200, 200)), max_pending=32)
    # Tokens that come one by one wake the client for each, as those of a real server do.
    single = load(paced, at_once(np.zeros(64), np.full(64, 200), np.full(64, 200)), max_pending=32)
    assert short.completed.all()
    assert long.completed.all()
    assert single.completed.all()
    request_us = 1e6 * short.cpu_s / 2000
    bundled_us, single_us = ((1e6 * run.cpu_s / len(run.requests) - request_us) / 199 for run in (long, single))
    with capsys.disabled():
        sys.stdout.write(
            f"\nclient: {request_us:.0f} µs a request, {bundled_us:.1f} µs a token, {single_us:.1f} µs one that comes "
            f"alone; the fake server gave {2000 / short.duration_s:.0f} requests/s, {40_000 / long.duration_s:.0f} "
            "tokens/s\n"
        )
