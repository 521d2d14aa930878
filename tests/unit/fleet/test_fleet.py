"""Fleet files: what is read, and what is refused in which words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.fleet import Fleet
from lora_capacity.fleet.assign import Tags
from lora_capacity.fleet.items import Items

LLAMA = "llama-3.1-8b-instruct-h100-64gb"
ADAPTERS = [
    {"adapter": "a", "rank": 8, "rate_per_s": 0.5, "together": "team"},
    {"adapter": "b", "rank": 16, "rate_per_s": 0.25, "cv": 2.0, "together": "team"},
    {"adapter": "c", "rank": 8, "rate_per_s": 3.0, "replicas": 2, "apart": "db"},
]
FILE: dict[str, Any] = {
    "adapters": ADAPTERS,
    "pools": [{"calibration": LLAMA, "most_servers": 4, "price_per_hour": 2.0, "max_num_seqs": 128}],
    "requests": {
        "input_tokens": {"mean": 220, "std": 250, "min": 4, "max": 1024},
        "output_tokens": {"mean": 200, "std": 210, "min": 4, "max": 1024},
    },
    "goodput": {"ttft": 1000},
}


def test_a_file_becomes_a_fleet() -> None:
    fleet = Fleet.from_mapping(FILE | {"headroom": 1.2, "arrivals": {"process": "gamma", "cv": 1.5}})
    assert fleet.names == ("a", "b", "c")
    np.testing.assert_array_equal(fleet.cvs, [1.5, 2.0, 1.5])
    assert (fleet.headroom, fleet.traffic.goodput.ttft_s, fleet.pools[0].name) == (1.2, 1.0, LLAMA)
    assert fleet.pools[0].settings == {"max_num_seqs": 128}


def test_adapters_may_stand_in_a_table(tmp_path: Path) -> None:
    rows = "adapter,rank,rate_per_s,apart\na,8,0.5,\nb,16,0.25,db\n"
    (tmp_path / "adapters.csv").write_text(rows, encoding="utf-8")
    fleet = Fleet.from_mapping(FILE | {"adapters": {"list": "adapters.csv"}}, tmp_path)
    assert (fleet.names, fleet.apart, fleet.ranks.tolist()) == (("a", "b"), ("", "db"), [8, 16])


def test_a_pool_nobody_has_profiled_is_derived() -> None:
    pool = {"model": "Llama-3.3-70B-Instruct", "gpu": "H100", "tensor_parallel_size": 4, "max_num_seqs": 64}
    (found,) = Fleet.from_mapping(FILE | {"pools": [pool]}).pools
    assert (found.gpus, found.name) == (4, "llama-3.3-70b-instruct-4xh100-80gb-derived")
    assert "--tensor-parallel-size 4" in found.calibration.server(**found.settings).serve_command("m")


def changed(row: int, **fields: Any) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [dict(row) for row in ADAPTERS]
    rows[row] |= fields
    return {"adapters": rows}


def changed_two() -> dict[str, Any]:
    return {"adapters": [dict(row, apart="db") for row in ADAPTERS]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed(1, adapter="a"), "adapters: 'a' is not allowed; allowed: every adapter once"),
        (changed(0, rate_per_s=0), "adapters[0].rate_per_s: 0 is not allowed; allowed: a number > 0"),
        (changed(0, ranks=8), "did you mean 'rank'?"),
        ({"adapters": []}, "adapters: 'an empty list'"),
        ({"pools": []}, "pools: 'an empty list' is not allowed; allowed: at least one pool"),
        ({"pools": [{"calibration": "llama"}]}, "pools[0].calibration: 'llama'"),
        ({"pools": [{"model": "Qwen3-8B"}]}, "pools[0].gpu: missing"),
        ({"pools": [{"gpu": "L4"}]}, "pools[0].model: missing"),
        ({"pools": [{"model": "Qwen3-8B", "gpu": "H1000"}]}, "pools[0].gpu: 'H1000'"),
        (
            {"pools": [{"calibration": LLAMA, "gpu": "L4"}]},
            "pools[0].gpu: cannot be combined with",
        ),
        ({"pools": [{"calibration": LLAMA}] * 2}, f"pools: '{LLAMA}' is not allowed; allowed: every name once"),
        ({"pools": [{"calibration": LLAMA, "max_num_seqs": 0}]}, "pools[0].max_num_seqs: 0"),
        ({"pools": [{"calibration": LLAMA}], "objective": "cheapest"}, "pools[0].price_per_hour: missing"),
        ({"objective": "most-served", "pools": [{"calibration": LLAMA}]}, "pools: 'no most_servers'"),
        ({"max_moves": 3}, "max_moves: 3 is not allowed; allowed: only beside current"),
        (changed_two(), "together: 'team' is not allowed"),
        ({"objective": "fewest"}, "did you mean 'fewest-gpus'?"),
        ({"pool": []}, "did you mean 'pools'?"),
        ({"headroom": 0}, "headroom: 0 is not allowed; allowed: a number >= 0.1 and <= 100"),
        ({"requests": {"trace": "t.csv"}}, "requests.trace: 't.csv'"),
        ({"arrivals": {"profile": [1, 2]}}, "arrivals.profile: 'a list' is not allowed; allowed: constant rates"),
        ({"requests": FILE["requests"] | {"cached_share": 0.5}}, "requests.cached_share: 0.5"),
        ({"base_model": {"rate_per_s": 1}}, "base_model: 'a mapping'"),
    ],
)
def test_what_cannot_be_used_is_told(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        Fleet.from_mapping(FILE | change)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"servers": [{"pool": "p", "adapters": [{"adapter": "a", "share": 0.5}]}]}, "shares of a: 0.5"),
        ({"servers": [{"adapters": []}]}, "'another content' is not allowed"),
        ([], "'another content' is not allowed"),
    ],
)
def test_a_placement_that_is_none_is_told(tmp_path: Path, content: Any, told: str) -> None:
    (tmp_path / "now.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError) as error:
        Fleet.from_mapping(FILE | {"current": "now.json"}, tmp_path)
    assert told in str(error.value)


def test_groups_are_one_item_and_pieces_are_many() -> None:
    fleet = Fleet.from_mapping(FILE)
    items = Items.of_fleet(fleet, np.array([1, 1, 2]))
    assert [list(members) for members in items.members] == [[(2, 0.5)], [(2, 0.5)], [(0, 1.0), (1, 1.0)]]
    np.testing.assert_allclose(items.rate_per_s, [1.5, 1.5, 0.75])
    np.testing.assert_allclose(items.burst, [1.5, 1.5, 0.5 + 0.25 * 2.0**2])
    assert (items.rank.tolist(), items.count.tolist()) == ([8, 8, 16], [1, 2])
    tags = Tags(fleet, items)
    assert tags.clash(0, [2, 1])  # pieces of one adapter
    assert not tags.clash(2, [0])
