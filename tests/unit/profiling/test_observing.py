"""Serving runs read off metrics: of the fake server, and of answers recorded from vLLM 0.32.0 for CPUs."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.load import at_once, run_load
from lora_capacity_profiling.observing import Observed, observe_server, read_dumps
from lora_capacity_profiling.server import Server
from lora_capacity_profiling.serving import Served, warm_up

from lora_capacity.errors import InputError

RECORDED = Path(__file__).parent / "data"
DUMPS = [RECORDED / f"metrics-0.32.0-{number}.txt" for number in range(3)]


def test_server_under_the_load_of_others(launch: Callable[..., Server]) -> None:
    server = launch(step_s=0.01)
    warm_up(Served(server.endpoint, ["a0", "a1"], "fake"))
    requests = at_once(np.zeros(60), np.full(60, 30), np.full(60, 10))
    told: list[float] = []

    def load(elapsed_s: float) -> None:
        if not told:  # between the first sample and the second, however long it takes
            run_load(server.endpoint, requests, ["a0"], base_model="fake", duration_s=60, max_pending=6)
        told.append(elapsed_s)

    began_s = time.monotonic()
    found = observe_server(server.url, 3.0, load)
    measured = found.measured()
    assert told == sorted(told)
    assert 2.99 <= found.duration_s <= time.monotonic() - began_s
    assert (measured["completed"], measured["arrivals"]) == (60, 60)
    assert (measured["mean_input_tokens"], measured["mean_output_tokens"]) == (30, 10)
    assert measured["input_throughput"] == pytest.approx(60 * 30 / found.duration_s)
    assert measured["mean_itl_ms"] >= 10
    assert measured["mean_ttft_ms"] >= 10
    assert 0 < measured["mean_running"] <= 6
    assert (found.adapters_seen, found.max_loras, found.interrupted) == (frozenset({"a0"}), 2, False)
    assert found.doubts(2) == []
    assert "requests came for 1 adapters, more than the 0 given" in found.doubts(0)


def test_idle_server_makes_no_run(launch: Callable[..., Server]) -> None:
    found = observe_server(launch().url, 0.4)
    assert found.adapters_seen is None
    with pytest.raises(ServerError, match="no request was completed in the time observed; observe for longer"):
        found.measured()


def test_server_that_is_gone_meanwhile(launch: Callable[..., Server]) -> None:
    server = launch()
    with pytest.raises(ServerError, match="answered at the beginning and never again"):
        observe_server(server.url, 1.5, lambda elapsed_s: server.stop())
    with pytest.raises(ServerError, match="cannot be reached"):
        observe_server(server.url, 1.0)


def test_recorded_answers(tmp_path: Path) -> None:
    found = read_dumps(DUMPS, duration_s=50.0)
    measured = found.measured()
    # What the client that was there saw in these 50 s.
    assert (measured["completed"], found.max_loras, len(found.adapters_seen or ())) == (130, 2, 4)
    assert (measured["completed_input_tokens"], measured["completed_output_tokens"]) == (7714, 4057)
    assert measured["mean_ttft_ms"] == pytest.approx(60, rel=0.2)  # the client's includes the way there
    assert measured["mean_running"] == pytest.approx(130 * (0.06 + 30.2 * 0.0093) / 50, rel=0.1)  # Little's law
    assert measured["duration_s"] == 50
    assert 0 < measured["mean_itl_ms"] < 100
    assert "mean_kv_usage" not in measured  # three samples do not tell
    assert found.window.last.kv_cache_tokens == 1024**3 / (2 * 4 * 4 * 32 * 2)
    for place, path in enumerate(DUMPS):
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        os.utime(copy, (time.time(), 1000.0 + 25 * place))
    by_time = read_dumps([tmp_path / path.name for path in DUMPS])
    assert by_time.measured() == pytest.approx(measured, nan_ok=True)


@pytest.mark.parametrize(
    ("paths", "error", "text"),
    [
        ([DUMPS[0], RECORDED / "none.txt"], InputError, "file not found"),
        ([DUMPS[0], Path("/dev/null")], InputError, "no ordinary file"),
        ([DUMPS[0], Path(__file__)], ServerError, "no metric of vLLM"),
    ],
)
def test_unusable_files(paths: list[Path], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        read_dumps(paths, 10.0)


def test_blanks_and_tabs_are_allowed_where_the_format_has_them(tmp_path: Path) -> None:
    files = []
    for dump in DUMPS:
        lines = (line.replace("} ", "}\t ") for line in dump.read_text().splitlines())
        files.append(tmp_path / dump.name)
        files[-1].write_text("".join(f"  \t{line}\n" for line in lines))
    blank, plain = read_dumps(files, 50.0), read_dumps(DUMPS, 50.0)
    assert blank.measured() == pytest.approx(plain.measured(), nan_ok=True)
    assert (blank.max_loras, blank.adapters_seen) == (plain.max_loras, plain.adapters_seen)


def test_whatever_ends_a_request_but_an_abort_completes_it(tmp_path: Path) -> None:
    files = [tmp_path / dump.name for dump in DUMPS]
    for dump, file in zip(DUMPS, files, strict=True):
        file.write_text(dump.read_text().replace('finished_reason="length"', 'finished_reason="repetition"'))
    repeated, plain = read_dumps(files, 50.0), read_dumps(DUMPS, 50.0)
    assert repeated.measured()["completed"] == plain.measured()["completed"] == 130
    for dump, file in zip(DUMPS, files, strict=True):
        file.write_text(dump.read_text().replace('finished_reason="length"', 'finished_reason="abort"'))
    with pytest.raises(ServerError, match="no request was completed"):
        read_dumps(files, 50.0).measured()


def test_one_answer_stands_for_all_since_the_start() -> None:
    with pytest.raises(InputError, match=r"--window: missing.* the time since the server's start"):
        read_dumps(DUMPS[2:])
    measured = read_dumps(DUMPS[2:], 60.0).measured()
    assert (measured["completed"], measured["arrivals"]) == (153, 153)  # as it counts itself
    assert (measured["completed_input_tokens"], measured["completed_output_tokens"]) == (9033, 4523)
    assert measured["mean_itl_ms"] == pytest.approx(1000 * 40.80820828997457 / 4370)


def changed(folder: Path, change: Callable[[str, int], str]) -> list[Path]:
    """Return recorded answers, each changed, given its text and its number."""
    files = [folder / dump.name for dump in DUMPS]
    for number, (dump, file) in enumerate(zip(DUMPS, files, strict=True)):
        file.write_text(change(dump.read_text(), number))
    return files


def beside(old: str, new: str) -> Callable[[str, int], str]:
    """Put the metrics of another server, which has done a thousand times as much, beside those recorded."""

    def change(text: str, number: int) -> str:
        other = [line.replace(old, new) + "e3" * (number > 0) for line in text.splitlines() if old in line]
        return "\n".join([text, *other])

    return change


def test_one_of_several_models_is_observed(tmp_path: Path) -> None:
    alone = read_dumps(DUMPS, 50.0)
    both = changed(tmp_path, beside('model_name="small"', 'model_name="large"'))
    for observed in (Observed("small"), Observed("x", model_name="small")):
        assert read_dumps(both, 50.0, observed=observed).measured() == pytest.approx(alone.measured(), nan_ok=True)
    other = read_dumps(both, 50.0, observed=Observed("large")).measured()
    assert other["completed"] > 1000 * 130
    found = read_dumps(both, 50.0, observed=Observed("small"))
    assert (found.max_loras, found.adapters_seen) == (None, None)  # whose adapters they are is not told
    with pytest.raises(InputError, match="--model-name: 'x' is not allowed; allowed: large, small"):
        read_dumps(both, 50.0, observed=Observed("x"))
    with pytest.raises(InputError, match="--model-name: 'x' is not allowed; allowed: small"):
        read_dumps(DUMPS, 50.0, observed=Observed("small", model_name="x"))


def test_one_of_several_engines_is_observed(tmp_path: Path) -> None:
    alone = read_dumps(DUMPS, 50.0)
    both = changed(tmp_path, beside('engine="0"', 'engine="1"'))
    with pytest.raises(InputError, match="--engine-index: 'none' is not allowed; allowed: 0, 1"):
        read_dumps(both, 50.0)
    first = read_dumps(both, 50.0, observed=Observed("small", engine=0))
    assert first.measured() == pytest.approx(alone.measured(), nan_ok=True)
    assert read_dumps(both, 50.0, observed=Observed("small", engine=1)).measured()["completed"] > 1000 * 130
    with pytest.raises(InputError, match="--engine-index: 2 is not allowed; allowed: 0, 1"):
        read_dumps(both, 50.0, observed=Observed("small", engine=2))


@pytest.mark.parametrize(
    ("old", "new", "error", "match"),
    [
        ('max_lora="2",running_lora_adapters="a1"', 'max_lora="4",running_lora_adapters="a1"', ServerError, "2 and 4"),
        ('max_lora="2"', 'max_lora="0"', InputError, "a server started with --enable-lora"),
        ("vllm:engine_sleep_state", "vllm:num_requests_swapped", ServerError, "V0 engine"),
        ("vllm:num_requests_running", "x", ServerError, "no number for running: vllm:num_requests_running is missing"),
        (
            "vllm:time_to_first_token",
            "x",
            ServerError,
            "no number for ttft: vllm:time_to_first_token_seconds is missing",
        ),
    ],
)
def test_what_is_no_server_that_is_predicted(
    tmp_path: Path, old: str, new: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        read_dumps(changed(tmp_path, lambda text, _: text.replace(old, new)), 50.0).measured()


@pytest.mark.parametrize("value", ["NaN", "+Inf"])
@pytest.mark.parametrize("name", ["num_requests_waiting", "kv_cache_usage_perc", "inter_token_latency_seconds_sum"])
def test_what_is_no_number_is_told_by_name(tmp_path: Path, name: str, value: str) -> None:
    files = changed(tmp_path, lambda text, _: re.sub(rf"^(vllm:{name}\{{.*\}}) \S+$", rf"\1 {value}", text, flags=re.M))
    with pytest.raises(ServerError, match=f"no number for vllm:{name}, but (nan|inf)"):
        read_dumps(files, 50.0)


def test_prompts_from_a_cache_and_skipped_requests_are_read(tmp_path: Path) -> None:
    def change(text: str, number: int) -> str:
        # Of external caches, whose metrics end alike, as many hits.
        for name, of_each in (("queries", 1000), ("hits", 125)):
            text = text.replace(
                f'prefix_cache_{name}_total{{engine="0",model_name="small"}} 0.0',
                f"prefix_cache_{name}_total{{}} {of_each * number}",
            )
        return text.replace('reason="deferred"} 0.0', f'reason="deferred"}} {number}')

    found = read_dumps(changed(tmp_path, change), 50.0)
    assert found.measured()["cached_share"] == 0.25
    assert found.window.summary()["mean_skipped"] == 1.0
    assert "25% of the prompt tokens came from the prefix cache" in " ".join(found.doubts(4))


def test_server_started_anew_meanwhile() -> None:
    with pytest.raises(ServerError, match=r"completed fell from \d+ to \d+|tokens fell from"):
        read_dumps(DUMPS[::-1], 10.0).measured()


def test_files_in_the_wrong_order(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file, at_s in zip(files, (20, 10), strict=True):
        file.write_bytes(DUMPS[0].read_bytes())
        os.utime(file, (at_s, at_s))
    with pytest.raises(InputError, match="files in order of time"):
        read_dumps(files)
