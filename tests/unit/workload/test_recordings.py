"""Recorded requests in the forms that people have them in; the rows are made up."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from lora_capacity.errors import InputError
from lora_capacity.workload import Workload, is_recording
from lora_capacity.workload.recordings import Deal, TraceSource, formats, read_recording

OURS = "arrival_s,adapter,input_tokens,output_tokens\n0.5,a,30,4\n1.5,,20,5\n2.0,b,10,6\n"
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2031-03-04 05:06:07.1234500,210,31
2031-03-04 05:06:08.6234500,17,2
2031-03-04 06:06:07.1234500,96,18
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
3,ChatGPT,120,45,165,Conversation log
8.5,GPT-4,75,0,75,API log
61,ChatGPT,14,90,104,API log
"""
MOONCAKE = """{"timestamp": 250, "input_length": 1100, "output_length": 12, "hash_ids": [1, 2, 3]}
{"timestamp": 2750, "input_length": 900, "output_length": 40, "hash_ids": [1, 2]}
"""
SERVEGEN = "request_id,client_id,timestamp,input_tokens,output_tokens\n0,7,0.25,11,22\n1,9,4.25,33,44\n"
LOG = """{"time": "2031-03-04T05:06:07Z", "model": "tenant-a", "prompt_tokens": 11, "completion_tokens": 9}
{"time": "2031-03-04T05:06:09.5Z", "model": "llama", "prompt_tokens": 8, "completion_tokens": 7, "user": null}
"""
TWO = {"deal": {"adapters": 2}}


@pytest.mark.parametrize(
    ("name", "content", "source", "after_s", "tokens"),
    [
        ("t.csv", OURS, {}, [0, 1, 1.5], [30, 20, 10]),
        ("t.csv", AZURE, {"format": "azure-llm", **TWO}, [0, 1.5, 3600], [210, 17, 96]),
        ("t.csv", AZURE.replace("4500,", "45+00:00,"), {"format": "azure-llm", **TWO}, [0, 1.5, 3600], [210, 17, 96]),
        ("t.csv", BURST, {"format": "burstgpt", **TWO}, [0, 58], [120, 14]),
        ("t.jsonl", MOONCAKE, {"format": "mooncake", **TWO}, [0, 2.5], [1100, 900]),
        ("t.csv", SERVEGEN, {"format": "servegen"}, [0, 4], [11, 33]),
        ("t.jsonl", LOG, {"format": "access-log"}, [0, 2.5], [11, 8]),
        ("t.jsonl", LOG.replace("07Z", "07").replace("5Z", "5"), {"format": "access-log"}, [0, 2.5], [11, 8]),
        ("t.csv", OURS.replace("arrival_s", "at_us"), {"time_column": "at_us"}, [0, 1e-6, 1.5e-6], [30, 20, 10]),
        ("t.csv", OURS, {"time_unit": "ms"}, [0, 1e-3, 1.5e-3], [30, 20, 10]),
    ],
)
def test_forms_are_read(
    tmp_path: Path, name: str, content: str, source: dict[str, Any], after_s: list[float], tokens: list[int]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = read_recording(tmp_path / name, TraceSource(file=name, **source))
    assert (found.time_s - found.time_s[0]).tolist() == pytest.approx(after_s)
    assert found.input_tokens.tolist() == tokens


def test_every_format_is_tried() -> None:
    assert {"lora-capacity", "azure-llm", "burstgpt", "mooncake", "servegen", "access-log"} == set(formats())


def test_every_kind_of_file_says_the_same(tmp_path: Path) -> None:
    rows = [
        {"arrival_s": float(time), "adapter": name or None, "input_tokens": int(inputs), "output_tokens": int(outputs)}
        for time, name, inputs, outputs in (line.split(",") for line in OURS.splitlines()[1:])
    ]
    lines = "\n".join(map(json.dumps, rows)).encode()
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "t.parquet")
    coded = table.set_column(1, "adapter", table.column("adapter").dictionary_encode())
    parquet.write_table(coded, tmp_path / "coded.parquet")
    for name, content in {
        "t.csv": OURS.encode(),
        "mark.csv": b"\xef\xbb\xbf" + OURS.encode(),
        "t.csv.gz": gzip.compress(OURS.encode()),
        "t.csv.bz2": bz2.compress(OURS.encode()),
        "t.jsonl": lines,
        "t.ndjson.gz": gzip.compress(lines + b"\n\n"),
    }.items():
        (tmp_path / name).write_bytes(content)
    for path in sorted(tmp_path.iterdir()):
        found = read_recording(path, TraceSource(file=path.name))
        assert is_recording(path)
        assert [found.adapter.names[i] for i in found.adapter.index] == ["a", "", "b"], path.name
        assert found.time_s.tolist() == [0.5, 1.5, 2.0]
        assert found.output_tokens.tolist() == [4, 5, 6]
    assert not is_recording(Path("workload.yaml"))


@pytest.mark.parametrize(
    ("name", "content", "source", "message"),
    [
        ("t.csv", OURS.replace("1.5", "soon"), {}, "row 2, arrival_s: 'soon' is not allowed; allowed: a number, or a"),
        ("t.csv", OURS.replace("1.5", ""), {}, "row 2, arrival_s: '' is not allowed"),
        ("t.csv", OURS.replace("20", "20.5"), {}, "row 2, input_tokens: '20.5' is not allowed; allowed: a whole"),
        ("t.csv", OURS.replace("20,5", "20,0"), {}, "row 2, output_tokens: '0' is not allowed"),
        ("t.csv", OURS.replace("20,5", "20"), {}, "row 2, output_tokens: missing"),
        ("t.csv", OURS.replace("20,5", "20,5,6"), {}, "row 2: '5 cells' is not allowed; allowed: one a column"),
        ("t.csv", "arrival_s,arrival_s\n1,2\n", {}, "first line: 'arrival_s' is not allowed; allowed: every column"),
        ("t.csv", OURS, {"time_column": "time"}, "columns arrival_s, .* a table with a column 'time'"),
        ("t.csv", OURS.replace("arrival_s", "t"), {"time_column": "t"}, "numbers without a unit.* allowed: time_unit"),
        ("t.csv", AZURE, {"format": "azure-llm", "time_unit": "s", **TWO}, "time_unit: 's' .* nothing for dates"),
        ("t.csv", AZURE, {"format": "azure-llm"}, "adapter: missing; allowed: adapter_column, or deal"),
        ("t.csv", BURST.replace(",45", ",0").replace(",90", ",0"), {"format": "burstgpt", **TWO}, "one request with"),
        ("t.jsonl", MOONCAKE.replace("2750", '"later"'), {"format": "mooncake", **TWO}, "row 2, timestamp: 'later'"),
        ("t.jsonl", MOONCAKE.replace("900", "-1"), {"format": "mooncake", **TWO}, "row 2, input_length: -1"),
        ("t.jsonl", MOONCAKE + "[1]\n", {"format": "mooncake", **TWO}, r"row 3: '\[1\]' .* a JSON object a line"),
        ("t.jsonl", MOONCAKE + "{\n", {"format": "mooncake", **TWO}, "row 3: '{' .* a JSON object a line"),
        ("t.csv.gz", OURS, {}, "allowed: a readable table"),
        ("t.parquet", OURS, {}, "allowed: a readable table"),
        ("t.txt", OURS, {}, "'t.txt' is not allowed; allowed: a name that ends in .csv"),
    ],
)
def test_what_cannot_be_read_is_told_by_row_and_column(
    tmp_path: Path, name: str, content: str, source: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_recording(tmp_path / name, TraceSource(file=name, **source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ({"format": "azure"}, "requests.trace.format: 'azure' .* did you mean 'azure-llm'"),
        ({"adapter_column": "a", **TWO}, "requests.trace.deal: cannot be combined with adapter_column"),
        ({"base_model": "a", **TWO}, "requests.trace.base_model: cannot be combined with deal"),
        ({"deal": {"adapters": 0}}, "requests.trace.deal.adapters: 0"),
        (
            {"deal": {"adapters": 2, "law": "uniform", "parameter": 2.0}},
            "requests.trace.deal.parameter: cannot be combined with uniform",
        ),
        ({"deal": {"adapters": 2, "law": "pareto"}}, "requests.trace.deal.law: 'pareto'"),
        ({"ranks": [0]}, "requests.trace.ranks"),
    ],
)
def test_descriptions_that_contradict_themselves_are_refused(
    tmp_path: Path, trace: dict[str, Any], message: str
) -> None:
    (tmp_path / "t.csv").write_text(OURS, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Workload.from_mapping({"requests": {"trace": {"file": "t.csv", **trace}}}, tmp_path)


@pytest.mark.parametrize(
    ("deal", "shares"),
    [
        ({"law": "uniform"}, [1 / 4] * 4),
        ({"law": "zipf"}, np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)),
        ({"law": "zipf", "parameter": 2.0}, np.array([1, 1 / 4, 1 / 9, 1 / 16]) / (205 / 144)),
    ],
)
def test_requests_are_dealt_in_the_shares_of_a_law(deal: dict[str, Any], shares: list[float]) -> None:
    count = 40_000
    names, index = Deal(adapters=4, **deal).draw(count)
    assert names == ["adapter-1", "adapter-2", "adapter-3", "adapter-4"]
    # Four standard deviations of a binomial share; seed 0.
    np.testing.assert_allclose(np.bincount(index) / count, shares, atol=4 * 0.5 / count**0.5)
    assert (index == Deal(adapters=4, **deal).draw(count)[1]).all()
    assert (index != Deal(adapters=4, seed=1, **deal).draw(count)[1]).any()


def test_a_small_dirichlet_concentration_leaves_few_adapters_with_most() -> None:
    def largest(parameter: float) -> float:
        deals = [Deal(adapters=50, law="dirichlet", parameter=parameter, seed=i).draw(2000)[1] for i in range(20)]
        return float(np.mean([np.bincount(index).max() / index.size for index in deals]))

    assert largest(0.05) > 0.3 > 0.05 > largest(100.0)


def test_a_workload_says_what_it_takes_for_granted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(BURST, encoding="utf-8")
    trace = {"file": "t.csv", "format": "burstgpt", "deal": {"adapters": 1}, "ranks": [8, 16]}
    workload = Workload.from_mapping({"requests": {"trace": trace}}, tmp_path)
    left_out, dealt = workload.assumptions
    assert "1 of 3 requests have no answer" in left_out
    assert "assigned to 1 by Zipf's law, exponent 1" in dealt
    assert workload.adapters.deal(1)[1].tolist() == [8]


def test_the_base_model_has_a_name_in_a_log(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(LOG, encoding="utf-8")
    trace = {"file": "t.jsonl", "format": "access-log", "base_model": "llama", "ranks": [8]}
    workload = Workload.from_mapping({"requests": {"trace": trace}, "horizon_s": 10}, tmp_path)
    assert workload.adapters.max_count == 1
    assert workload.base_rate_per_s == pytest.approx(0.1)
