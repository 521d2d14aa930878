from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_capacity.errors import InputError
from lora_capacity.workload import AdapterList, AdapterMix, Workload
from lora_capacity.workload.parsing import WorkloadFile

LENGTHS = {"mean": 220, "std": 250, "min": 4, "max": 1024}
VALID: dict[str, Any] = {
    "adapters": {"mix": {"rates_per_s": [0.4, 0.05], "ranks": [8, 16, 16]}},
    "requests": {"input_tokens": LENGTHS, "output_tokens": LENGTHS},
}
TABLES = {
    "list.csv": "adapter,rank,rate_per_s\nx,8,2.0\ny,32,1.0\n",
    "lengths.csv": "tokens,weight\n100,3\n300,1\n",
    "trace.csv": "arrival_s,adapter,input_tokens,output_tokens,rank\n0,y,10,30,8\n1,x,20,10,8\n4,x,30,20,8\n",
}
TRACE = {"requests": {"trace": "trace.csv"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TABLES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def changed(path: str, value: object, base: Mapping[str, Any] = VALID) -> dict[str, Any]:
    """Return a copy of a mapping with another value at a dotted path."""
    key, _, rest = path.partition(".")
    return {**base, key: changed(rest, value, base.get(key, {})) if rest else value}


def without(path: str, base: Mapping[str, Any] = VALID) -> dict[str, Any]:
    """Return a copy of a mapping without the key at a dotted path."""
    key, _, rest = path.partition(".")
    return {**base, key: without(rest, base[key])} if rest else {k: v for k, v in base.items() if k != key}


def test_defaults() -> None:
    workload = Workload.from_mapping(VALID)
    assert isinstance(workload.adapters, AdapterMix)
    assert (workload.horizon_s, workload.base_rate_per_s, workload.max_pending) == (3600.0, 0.0, None)
    assert (workload.arrivals.process, workload.arrival_cv) == ("poisson", 1.0)
    assert workload.trace is None


@pytest.mark.parametrize(
    ("given", "expected"), [("none", None), ("None", None), (None, None), (26000, 26000), (1.0, 1)]
)
def test_max_pending(given: object, expected: int | None) -> None:
    assert Workload.from_mapping(changed("max_pending", given)).max_pending == expected


def test_everything_given(folder: Path) -> None:
    mapping = {
        "adapters": {"list": "list.csv"},
        "base_model": {"rate_per_s": 0.25},
        "requests": {"input_tokens": {"histogram": "lengths.csv"}, "output_tokens": LENGTHS},
        "arrivals": {"process": "gamma", "cv": 2},
        "horizon_s": 60,
        "max_pending": 100,
    }
    workload = Workload.from_mapping(mapping, folder)
    assert isinstance(workload.adapters, AdapterList)
    assert workload.adapters.names == ("x", "y")
    assert workload.adapters.ranks.tolist() == [8, 32]
    assert (workload.mean_input_tokens, workload.base_rate_per_s, workload.horizon_s) == (150.0, 0.25, 60.0)
    assert (workload.arrivals.process, workload.arrival_cv, workload.max_pending) == ("gamma", 2.0, 100)


@pytest.mark.parametrize("extra", [{}, {"arrivals": {"process": "trace"}}, {"max_pending": 5}])
def test_a_trace_needs_nothing_else(folder: Path, extra: dict[str, Any]) -> None:
    workload = Workload.from_mapping(TRACE | extra, folder)
    assert workload.arrivals.process == "trace"
    assert workload.horizon_s == 4
    assert workload.adapters.max_count == 2
    assert workload.mean_input_tokens == pytest.approx(20)
    assert workload.mean_input_output_tokens == pytest.approx((300 + 200 + 600) / 3)


def test_a_list_beside_a_trace_gives_ranks_and_order(folder: Path) -> None:
    (folder / "ranks.csv").write_text("adapter,rank\ny,64\nx,16\n")
    for name, names, ranks in [("ranks.csv", ("y", "x"), [64, 16]), ("list.csv", ("x", "y"), [8, 32])]:
        workload = Workload.from_mapping(TRACE | {"adapters": {"list": name}}, folder)
        assert isinstance(workload.adapters, AdapterList)
        assert workload.adapters.names == names
        assert workload.adapters.ranks.tolist() == ranks
        assert sorted(workload.adapters.rates_per_s.tolist()) == [0.25, 0.5]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            [],
            "workload: 'an empty list' is not allowed; allowed: a mapping with the keys adapters, base_model, requests",
        ),
        ({}, "requests: missing; allowed: a mapping with the keys input_tokens, output_tokens, trace"),
        (without("adapters"), "adapters: missing; allowed: a mapping with the keys mix, list"),
        (changed("horizons", 1), "horizons: 'horizons' is not allowed; allowed: the keys .*; did you mean 'horizon_s'"),
        (dict([*VALID.items(), (3, 1)]), "3: 3 is not allowed; allowed: the keys"),
        ({**VALID, "a\nb": 1}, r"^a\\nb: 'a\\nb' is not allowed; allowed: the keys"),
        (
            changed("adapters", []),
            "adapters: 'an empty list' is not allowed; allowed: a mapping with the keys mix, list",
        ),
        (changed("adapters", {}), "adapters: 'neither' is not allowed; allowed: one of mix, list and rates"),
        (
            changed("adapters.list", "list.csv"),
            "adapters: 'mix and list' is not allowed; allowed: one of mix, list and rates",
        ),
        (changed("adapters.mixed", {}), "adapters.mixed: .*; did you mean 'mix'"),
        (
            changed("adapters.mix", None),
            "adapters.mix: missing; allowed: a mapping with the keys rates_per_s",
        ),
        (changed("adapters.mix.rate_per_s", 1), "adapters.mix.rate_per_s: .*; did you mean 'rates_per_s'"),
        (
            without("adapters.mix.ranks"),
            "adapters.mix.ranks: missing; allowed: a list of at least one whole",
        ),
        (changed("adapters.mix.rates_per_s", []), "adapters.mix.rates_per_s: 'an empty list'"),
        (changed("adapters.mix.rates_per_s", [0.1, "fast"]), r"adapters.mix.rates_per_s\[1\]: 'fast' is not allowed"),
        (changed("adapters.mix.rates_per_s", {"a": 1}), "adapters.mix.rates_per_s: 'a mapping' is not allowed"),
        (
            changed("adapters.mix.ranks", [8.5]),
            r"adapters.mix.ranks\[0\]: 8.5 is not allowed; allowed: a whole number >= 1",
        ),
        (changed("base_model", 0.5), "base_model: 0.5 is not allowed; allowed: a mapping with the keys rate_per_s"),
        (changed("base_model.rate_per_s", -1), "base_model.rate_per_s: -1 is not allowed; allowed: a number >= 0"),
        (changed("base_model.rate_s", 1), "base_model.rate_s: .*; did you mean 'rate_per_s'"),
        (changed("requests", []), "requests: 'an empty list' is not allowed"),
        (
            without("requests.output_tokens"),
            "requests.output_tokens: missing; allowed: a mapping with the keys",
        ),
        (changed("requests.input_token", {}), "requests.input_token: .*; did you mean 'input_tokens'"),
        (changed("requests.input_tokens", 220), "requests.input_tokens: 220 is not allowed; allowed: a mapping"),
        (
            without("requests.input_tokens.std"),
            "requests.input_tokens.std: missing; .*std, min and max are all",
        ),
        (changed("requests.input_tokens.means", 1), "requests.input_tokens.means: .*; did you mean 'mean'"),
        (changed("requests.input_tokens.mean", "long"), "requests.input_tokens.mean: 'long' is not allowed"),
        (
            changed("requests.input_tokens.mean", 2000),
            "requests.input_tokens.mean: 2000 is not allowed; .* >= 4 and <= 1024",
        ),
        (changed("requests.input_tokens.min", 2000), r"requests.input_tokens.min: 2000 .* allowed: .* to max \(1024\)"),
        (changed("requests.output_tokens.std", 900), "requests.output_tokens.std: 900.0 .* allowed: 0 to 416.73"),
        (
            changed("requests.output_tokens.histogram", "x.csv"),
            "requests.output_tokens: 'mean and .*' .* either histogram or",
        ),
        (
            changed("arrivals", "poisson"),
            "arrivals: 'poisson' is not allowed; allowed: a mapping with the keys process, cv",
        ),
        (changed("arrivals.process", "possion"), "arrivals.process: 'possion' .*; did you mean 'poisson'"),
        (changed("arrivals.process", ["gamma"]), r"arrivals.process: \['gamma'\] is not allowed"),
        (changed("arrivals.process", "gamma"), "arrivals.cv: missing; .*; gamma needs a cv"),
        (
            changed("arrivals.process", "trace"),
            "arrivals.process: 'trace' .* allowed: poisson, gamma; trace needs requests.t",
        ),
        (changed("arrivals.cv", 2), "arrivals.cv: 2 is not allowed; allowed: 1 for poisson"),
        (changed("arrivals.cvs", 2), "arrivals.cvs: .*; did you mean 'cv'"),
        (changed("horizon_s", 0), r"horizon_s: 0 is not allowed; allowed: a number >= 0.1 and <= 2.592e\+06"),
        (changed("horizon_s", "1h"), "horizon_s: '1h' is not allowed"),
        (changed("horizon_s", float("inf")), "horizon_s: inf is not allowed"),
        (changed("horizon_s", None), "horizon_s: missing"),
        (changed("max_pending", 0), "max_pending: 0 is not allowed; allowed: a whole number >= 1"),
        (changed("max_pending", -5), "max_pending: -5 is not allowed"),
        (changed("max_pending", 1.5), "max_pending: 1.5 is not allowed"),
        (changed("max_pending", "many"), "max_pending: 'many' is not allowed"),
        (changed("max_pending", False), "max_pending: False is not allowed"),
    ],
)
def test_bad_content_is_told_in_one_line(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Workload.from_mapping(mapping)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (TRACE | {"base_model": {"rate_per_s": 1}}, "base_model: cannot be combined with requests.trace"),
        (TRACE | {"arrivals": {"process": "poisson"}}, "arrivals.process: 'poisson' .* allowed: trace, beside"),
        (TRACE | {"arrivals": {"cv": 2}}, "arrivals.cv: 'cv' is not allowed; allowed: the keys process"),
        (
            TRACE | {"adapters": VALID["adapters"]},
            "adapters: 'mix' is not allowed; allowed: a list beside requests.trace",
        ),
        (TRACE | {"adapters": {}}, "adapters: 'neither' is not allowed"),
        (TRACE | {"horizon_s": -1}, r"horizon_s: -1 is not allowed; allowed: a number >= 0.1 and <= 2.592e\+06"),
        (
            changed("requests.input_tokens", LENGTHS, TRACE),
            "requests.input_tokens: cannot be combined .* which has its own lengths",
        ),
        (changed("requests.trace", None), "requests.(input_tokens|trace): "),
        ({"requests": {"trace": 5}}, "requests.trace: 5 is not allowed; allowed: the path of a table"),
        ({"requests": {"trace": ""}}, "requests.trace: '' is not allowed"),
        ({"requests": {"trace": "gone.csv"}}, "file not found: .*gone.csv"),
        ({"requests": {"trace": "\0"}}, "requests.trace: '.x00' is not allowed"),
        ({"requests": {"trace": "a\nb"}}, r"requests.trace: 'a\\nb' is not allowed"),
        (
            changed("adapters", {"list": ["a"]}),
            "adapters.list: 'a list' is not allowed; allowed: the path of a table",
        ),
        (changed("adapters", {"list": "gone.csv"}), "file not found: .*gone.csv"),
        (changed("adapters", {"list": "."}), "is not allowed; allowed: a readable CSV file"),
        (changed("requests.input_tokens", {"histogram": 7}), "requests.input_tokens.histogram: 7 is not allowed"),
        (changed("requests.input_tokens", {"histogram": "gone.csv"}), "file not found: .*gone.csv"),
    ],
)
def test_bad_tables_named_are_told(folder: Path, mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Workload.from_mapping(mapping, folder)
    assert "\n" not in str(caught.value)


def test_prefixes_that_prompts_share() -> None:
    assert not Workload.from_mapping(VALID).shares_prefix
    workload = Workload.from_mapping(changed("requests.shared_prefix_tokens", 90))
    assert workload.shared_prefixes(3).tolist() == [90, 90, 90, 90]
    assert Workload.from_mapping(changed("requests.cached_share", 0.5)).cached_share == 0.5


def test_a_list_gives_adapters_prefixes_of_their_own(folder: Path) -> None:
    text = "adapter,rank,rate_per_s,shared_prefix_tokens\na,8,1,40\nb,8,1,0\n"
    (folder / "list.csv").write_text(text)
    requests = VALID["requests"] | {"shared_prefix_tokens": 7}
    workload = Workload.from_mapping(VALID | {"adapters": {"list": "list.csv"}, "requests": requests}, folder)
    assert workload.shared_prefixes(2).tolist() == [40, 0, 7]
    assert workload.shared_prefixes(1).tolist() == [40, 7]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ({"shared_prefix_tokens": -1}, "requests.shared_prefix_tokens: -1 .* a whole number >= 0"),
        ({"shared_prefix_tokens": 1.5}, "requests.shared_prefix_tokens: 1.5"),
        ({"cached_share": 1.0}, "requests.cached_share: 1.0 .* a number >= 0 and < 1"),
        (
            {"cached_share": 0.5, "shared_prefix_tokens": 9},
            "requests.cached_share: 0.5 .* 0 beside shared_prefix_tokens",
        ),
    ],
)
def test_bad_prefixes_are_told(requests: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Workload.from_mapping(VALID | {"requests": VALID["requests"] | requests})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapter,rank\na,8\n", "allowed: a table with a column 'rate_per_s'"),
        ("adapter,rank,rate_per_sec\na,8,1\n", "a column 'rate_per_s'; did you mean 'rate_per_sec'"),
        ("adapter,rank,rate_per_s\n", "'no rows' is not allowed"),
        ("", "'columns none' is not allowed"),
        ("adapter,rank,rate_per_s\na,eight,1\n", "line 2, rank: 'eight' is not allowed; allowed: a whole number >= 1"),
        ("adapter,rank,rate_per_s\na,8.5,1\n", "line 2, rank: '8.5'"),
        ("adapter,rank,rate_per_s\na,0,1\n", "line 2, rank: '0'"),
        (
            "adapter,rank,rate_per_s\na,1e300,1\n",
            r"list.csv line 2, rank: '1e300' .* a whole number >= 1",
        ),
        ("adapter,rank,rate_per_s\na,8,0\n", "line 2, rate_per_s: '0' is not allowed; allowed: a number > 0"),
        ("adapter,rank,rate_per_s\na,8,nan\n", "line 2, rate_per_s: 'nan'"),
        ("adapter,rank,rate_per_s\na,8,\n", "line 2, rate_per_s: ''"),
        ("adapter,rank,rate_per_s\n,8,1\n", "line 2, adapter: ''"),
        (
            "adapter,rank,rate_per_s\na,8,1\na,8,1\n",
            "list.csv, adapter: 'a' is not allowed; allowed: every adapter once",
        ),
        (
            "adapter,rank,rate_per_s,shared_prefix_tokens\na,8,1,40\nb,8,1,\n",
            "list.csv, shared_prefix_tokens of b: '' .* write 0 for none",
        ),
    ],
)
def test_bad_adapter_lists_are_told(folder: Path, text: str, message: str) -> None:
    (folder / "list.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        Workload.from_mapping(changed("adapters", {"list": "list.csv"}), folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens,count\n1,1\n", "allowed: a table with a column 'weight'"),
        ("tokens,weight\n0,1\n", "line 2, tokens: '0' is not allowed; allowed: a whole number >= 1"),
        ("tokens,weight\n1,-1\n", "line 2, weight: '-1'"),
        ("tokens,weight\n1,0\n", "lengths.csv, weight: 0 is not allowed; allowed: at least one weight > 0"),
        ("tokens,weight\n10000000,1\n", "lengths.csv, tokens: 10000000 is not allowed"),
    ],
)
def test_bad_histograms_are_told(folder: Path, text: str, message: str) -> None:
    (folder / "lengths.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        Workload.from_mapping(changed("requests.input_tokens", {"histogram": "lengths.csv"}), folder)


def test_the_format_has_a_json_schema() -> None:
    schema = WorkloadFile.model_json_schema()
    assert schema["required"] == ["requests"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["horizon_s"] == {
        "default": 3600.0,
        "minimum": 0.1,
        "maximum": 2_592_000.0,
        "title": "Horizon S",
        "type": "number",
    }
    assert schema["$defs"]["Mix"]["properties"]["ranks"]["items"] == {"maximum": 65536, "minimum": 1, "type": "integer"}
    assert schema["$defs"]["ArrivalProcess"]["properties"]["process"]["enum"] == ["poisson", "gamma", "trace"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("adapters", "adapters: missing; allowed: a mapping with the keys mix, list"),
        ("adapters.mix.ranks", "adapters.mix.ranks: missing"),
        ("requests.input_tokens", "requests.input_tokens: missing; allowed: a mapping"),
        ("max_pending", None),
    ],
)
def test_a_null_is_refused_where_nothing_may_be_left_out(path: str, message: str | None) -> None:
    if message is None:
        assert Workload.from_mapping(changed(path, None)).max_pending is None
        return
    with pytest.raises(InputError, match=message):
        Workload.from_mapping(changed(path, None))
