"""Workloads from whatever people have of one."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import yaml

from lora_capacity.errors import InputError
from lora_capacity.tables import Frame
from lora_capacity.workload import Goodput, Workload, load_workload

LENGTHS = {"mean": 30, "std": 10, "min": 4, "max": 60}
MIX = {"mix": {"rates_per_s": [0.4], "ranks": [8]}}
CONTENT: dict[str, Any] = {"adapters": MIX, "requests": {"input_tokens": LENGTHS, "output_tokens": LENGTHS}}
ADAPTERS = pd.read_csv(io.StringIO("adapter,rank,rate_per_s,shared_prefix_tokens\na,8,0.5,\nb,16,0.1,\n"))
REQUESTS = pd.read_csv(
    io.StringIO(
        "arrival_s,adapter,input_tokens,output_tokens,rank\n0,a,10,20,8\n1,b,30,40,16\n2,,50,60,\n3,a,70,80,8\n"
    )
)


class Old:
    """A table of a library that has the older protocol only."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __dataframe__(self, nan_as_null: bool = False, allow_copy: bool = True) -> Any:
        return self.table.__dataframe__(nan_as_null, allow_copy)


FRAMES = {
    "pandas": lambda table: table,
    "pandas categories": lambda table: table.astype({"adapter": "category"}),
    "polars": pl.from_pandas,
    "polars categories": lambda table: pl.from_pandas(table).with_columns(pl.col("adapter").cast(pl.Categorical)),
    "arrow": pa.Table.from_pandas,
    "interchange": lambda table: Old(pa.Table.from_pandas(table)),
}


def listed(adapters: object) -> Workload:
    return Workload.from_mapping(CONTENT | {"adapters": {"list": adapters}})


@pytest.mark.parametrize("kind", FRAMES)
def test_adapters_may_be_a_frame_of_any_library(kind: str) -> None:
    adapters: Any = listed(FRAMES[kind](ADAPTERS)).adapters
    assert adapters.names == ("a", "b")
    assert adapters.rates_per_s.tolist() == [0.5, 0.1]
    assert adapters.ranks.tolist() == [8, 16]
    assert adapters.shared_prefix_tokens is None


@pytest.mark.parametrize("kind", FRAMES)
def test_requests_may_be_a_frame_of_any_library(kind: str, tmp_path: Path) -> None:
    found = load_workload(FRAMES[kind](REQUESTS))
    REQUESTS.to_csv(tmp_path / "requests.csv", index=False)
    expected = load_workload(tmp_path / "requests.csv")
    for name in ("arrival_s", "adapter", "input_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(found.trace, name), getattr(expected.trace, name))
    assert found.adapters.deal(2)[1].tolist() == [8, 16]


def test_dates_in_a_frame_are_times() -> None:
    found: Any = load_workload(REQUESTS.assign(arrival_s=pd.to_datetime(REQUESTS.arrival_s, unit="s"))).trace
    assert found.arrival_s.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_lengths_and_rates_over_time_may_be_frames() -> None:
    histogram = pd.DataFrame({"tokens": [10, 30], "weight": [1, 3]})
    rates = pd.DataFrame({"adapter": ["a", "a"], "t_s": [0, 60], "rate_per_s": [1.0, 3.0]})
    content = {"adapters": {"rates": rates, "ranks": pd.Series([8])}}
    found = load_workload(
        content | {"requests": {name: {"histogram": histogram} for name in ("input_tokens", "output_tokens")}}
    )
    assert found.mean_input_tokens == 25.0
    assert found.rates_over_time(1)[:, 0].tolist() == pytest.approx([1.0, 3.0])


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (ADAPTERS.rename(columns={"rank": "ranks"}), r"^adapters.list: .* a column 'rank'; did you mean 'ranks'"),
        (ADAPTERS.assign(rank=[8, 0]), r"^adapters.list row 2, rank: 0 .* a whole number >= 1"),
        (ADAPTERS.assign(rank=["x", "8"]), r"^adapters.list row 1, rank: 'x'"),
        (ADAPTERS.assign(rank=[8, None]), r"^adapters.list row 2, rank: ''"),
        (ADAPTERS.assign(rank=["x", 8]), r"^adapters.list: 'DataFrame' .* a table that Arrow can read"),
        (ADAPTERS.assign(adapter="a"), r"^adapters.list, adapter: 'a' .* every adapter once"),
        (ADAPTERS.iloc[:0], r"^adapters.list: 'no rows'"),
    ],
)
def test_what_is_wrong_in_a_frame_is_told_by_row_and_column(table: pd.DataFrame, match: str) -> None:
    with pytest.raises(InputError, match=match):
        listed(table)


def test_what_is_wrong_in_requests_is_told_by_row_and_column() -> None:
    with pytest.raises(InputError, match=r"^requests.trace row 2, input_tokens: 0"):
        load_workload(REQUESTS.assign(input_tokens=[1, 0, 1, 1]))
    with pytest.raises(InputError, match=r"^requests.trace: .* a column 'adapter'"):
        load_workload(REQUESTS.drop(columns="adapter"))


def test_a_workload_stands_for_itself_its_content_and_its_file(tmp_path: Path) -> None:
    (tmp_path / "workload.yaml").write_text(yaml.safe_dump(CONTENT), encoding="utf-8")
    workload = load_workload(CONTENT)
    assert load_workload(workload) is workload
    for path in (tmp_path / "workload.yaml", str(tmp_path / "workload.yaml")):
        assert load_workload(path).adapters.deal(2)[0].tolist() == [0.4, 0.4]


def test_bounds_take_the_place_of_the_workloads_own() -> None:
    asked = CONTENT | {"goodput": {"tpot": 50}, "attainment": 0.9}
    assert load_workload(asked).goodput == Goodput.from_ms({"tpot": 50}, 0.9)
    assert load_workload(asked, goodput={"ttft": 1000}).goodput == Goodput.from_ms({"ttft": 1000}, 0.9)
    assert load_workload(asked, attainment=0.8).goodput == Goodput.from_ms({"tpot": 50}, 0.8)
    assert load_workload(asked, goodput=Goodput(), attainment=0.8).goodput == Goodput(attainment=0.8)
    with pytest.raises(InputError, match=r"goodput.tfft: .* did you mean 'ttft'"):
        load_workload(asked, goodput={"tfft": 1})


def test_a_frame_is_called_by_its_name() -> None:
    assert str(Frame.of(ADAPTERS).named("mine")) == "mine"
