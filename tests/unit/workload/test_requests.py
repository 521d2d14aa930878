from pathlib import Path

import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.workload import BASE_MODEL, Requests, Trace
from lora_capacity.workload.recordings import TraceSource

ROWS = """arrival_s,adapter,input_tokens,output_tokens,rank
105,b,10,20,16
100,a,1,2,8
102,b,30,40,16
103,,5,6,
110,c,7,8,32
"""


def read(folder: Path, text: str = ROWS, **options: object) -> Trace:
    path = folder / "trace.csv"
    path.write_text(text)
    return Trace.from_file(path, TraceSource(file=path.name), **options)


def without_rank(text: str = ROWS) -> str:
    return "\n".join(line.rsplit(",", 1)[0] for line in text.splitlines())


def test_adapters_are_ordered_by_requests_then_name(tmp_path: Path) -> None:
    trace = read(tmp_path)
    assert trace.adapters.names == ("b", "a", "c")
    assert trace.adapters.ranks.tolist() == [16, 8, 32]
    assert trace.adapters.rates_per_s.tolist() == pytest.approx([0.2, 0.1, 0.1])
    assert trace.base_rate_per_s == pytest.approx(0.1)
    assert trace.horizon_s == 10


def test_requests_are_sorted_and_start_at_zero(tmp_path: Path) -> None:
    requests = read(tmp_path).requests
    assert requests.arrival_s.tolist() == [0, 2, 3, 5, 10]
    assert requests.adapter.tolist() == [1, 0, BASE_MODEL, 0, 2]
    assert requests.input_tokens.tolist() == [1, 30, 5, 10, 7]
    assert requests.output_tokens.tolist() == [2, 40, 6, 20, 8]
    assert requests.adapter.dtype == requests.input_tokens.dtype == requests.output_tokens.dtype == np.int32
    assert len(requests) == 5


def test_a_horizon_cuts_the_record_off(tmp_path: Path) -> None:
    assert read(tmp_path, horizon_s=40.0).horizon_s == 40
    trace = read(tmp_path, horizon_s=4.0)
    assert trace.horizon_s == 4
    assert len(trace.requests) == 3
    assert trace.adapters.names == ("a", "b")
    assert trace.adapters.rates_per_s.tolist() == [0.25, 0.25]


def test_a_list_gives_ranks_and_order(tmp_path: Path) -> None:
    trace = read(tmp_path, without_rank(), ranks={"c": 64, "b": 16, "a": 8})
    assert trace.adapters.names == ("c", "b", "a")
    assert trace.adapters.ranks.tolist() == [64, 16, 8]
    assert trace.requests.adapter.tolist() == [2, 1, BASE_MODEL, 1, 0]


def test_adapters_without_requests_in_the_horizon_are_left_out(tmp_path: Path) -> None:
    trace = read(tmp_path, horizon_s=4.0, ranks={"c": 64, "b": 16, "a": 8})
    assert trace.adapters.names == ("b", "a")


@pytest.mark.parametrize(
    ("arrival_s", "cv"),
    [
        pytest.param([0, 1, 2, 3, 4], 0.0, id="regular"),
        pytest.param([0, 0, 2, 2, 4], (4 / 3) ** 0.5, id="pairs"),
        pytest.param([0, 5], 1.0, id="too few to tell"),
    ],
)
def test_cv_is_of_the_gaps(tmp_path: Path, arrival_s: list[float], cv: float) -> None:
    rows = "\n".join(f"{time},a,1,1,8" for time in arrival_s)
    assert read(tmp_path, f"arrival_s,adapter,input_tokens,output_tokens,rank\n{rows}").cv == pytest.approx(cv)


def test_cv_is_within_adapters_not_between_them(tmp_path: Path) -> None:
    rows = [f"{10 * i},a,1,1,8" for i in range(10)] + [f"{i + 0.5},b,1,1,8" for i in range(90)]
    assert read(tmp_path, "\n".join(["arrival_s,adapter,input_tokens,output_tokens,rank", *rows])).cv == pytest.approx(
        0
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROWS.replace("adapter", "adaptor"), "allowed: a table with a column 'adapter'; did you mean 'adaptor'"),
        (ROWS.splitlines()[0], "'no rows' is not allowed"),
        ("", "a table with a column 'arrival_s'"),
        (ROWS.replace("105", "soon"), "row 1, arrival_s: 'soon' is not allowed; allowed: a number"),
        (ROWS.replace("105", "nan"), "row 1, arrival_s: 'nan' is not allowed"),
        (ROWS.replace("1,2,8", "0,2,8"), "row 2, input_tokens: '0' is not allowed; allowed: a whole number >= 1"),
        (ROWS.replace("1,2,8", "1,2.5,8"), "row 2, output_tokens: '2.5' is not allowed"),
        (
            ROWS.replace("1,2,8", "1,10000000,8"),
            "row 2, output_tokens: '10000000' is not allowed; allowed: .* >= 1 and <= 1000000",
        ),
        (
            ROWS.replace("40,16", "40,32"),
            "rank of adapter 'b': '16 and 32' is not allowed; allowed: one whole number >= 1",
        ),
        (
            ROWS.replace("2,8\n", "2,\n"),
            "rank of adapter 'a': missing; .*; add a column rank, say which ranks",
        ),
        (ROWS.replace("2,8\n", "2,0\n"), "row 2, rank: '0' is not allowed"),
        (ROWS.replace("2,8\n", "2,1e300\n"), r"row 2, rank: '1e300' is not allowed"),
        (without_rank(), "rank of adapter '[ab]': missing"),
        ("\n".join(ROWS.splitlines()[:2]), "arrival_s: 105.0 is not allowed; allowed: requests at two times or more"),
        (
            "arrival_s,adapter,input_tokens,output_tokens\n1,,1,1\n2,,1,1",
            "allowed: a request for an adapter in the first 1 s",
        ),
    ],
)
def test_bad_traces_are_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_names_of_trace_and_list_must_match(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trace.csv, adapter: 'c' is not allowed; allowed: a name of adapters.list"):
        read(tmp_path, ranks={"a": 8, "b": 8})
    with pytest.raises(InputError, match=r"adapters.list: 'bb' is not allowed; .*; did you mean 'b'"):
        read(tmp_path, ranks={"a": 8, "b": 8, "bb": 8, "c": 8})


def test_requests_cannot_be_written_to() -> None:
    requests = Requests(np.zeros(1), np.zeros(1), np.ones(1), np.ones(1))
    for column in (requests.arrival_s, requests.adapter, requests.input_tokens, requests.output_tokens):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 5
