"""What becomes of a fleet's wishes, with servers whose capacity is known: nothing is predicted or played here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_capacity.errors import InfeasibleError
from lora_capacity.fleet import Fleet, Placement, place
from lora_capacity.fleet.fleet import read_placement
from lora_capacity.fleet.oracle import Load, Oracle
from lora_capacity.fleet.plays import Plays, Server
from tests.unit.fleet.test_columns import ADAPTERS, LOAD_PER_S
from tests.unit.fleet.test_fleet import FILE, LLAMA

PLAYED_PER_S = 0.9 * LOAD_PER_S
"""Load that a server holds when it is played, less than the steady twin says."""


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers hold a load and a number of adapters, where every adapter has a slot."""

    def reached(self: Oracle, pool: int, load: Load, mode: Any, more: Any = 1.0) -> NDArray[np.float64]:
        factor = self.correction[pool, mode] * self.fleet.headroom * more
        fits = (load.total_per_s * factor <= LOAD_PER_S + 1e-9) & (load.adapters <= ADAPTERS)
        return np.where(np.broadcast_to(mode, fits.shape) == 0, fits.astype(float), 0.0)

    def played(self: Plays, servers: list[Server], loads: Any, seeds: Any) -> NDArray[np.float64]:
        own = np.array([self.items.rate_per_s[server.items].sum() for server in servers])
        found = own[:, np.newaxis] * np.asarray(loads) <= PLAYED_PER_S
        return np.repeat(found[..., np.newaxis].astype(float), len(seeds), axis=2)

    def columns(self: Plays, servers: list[Server], loads: Any, seeds: Any) -> dict[str, NDArray[np.float64]]:
        return dict.fromkeys(("attainment", "service"), np.ones((len(servers), len(loads), len(seeds))))

    monkeypatch.setattr(Oracle, "reached", reached)
    monkeypatch.setattr(Plays, "reached", played)
    monkeypatch.setattr(Plays, "columns", columns)


def fleet_of(rates: list[float], change: dict[str, Any] | None = None, folder: Path = Path()) -> Fleet:
    rows = [{"adapter": f"a{i}", "rank": 8, "rate_per_s": rate} for i, rate in enumerate(rates)]
    pool = {"name": "p", "calibration": LLAMA, "price_per_hour": 2.0}
    return Fleet.from_mapping({**FILE, "adapters": rows, "pools": [pool], "headroom": 0.98, **(change or {})}, folder)


def loads(placement: Placement) -> list[float]:
    return sorted(server.rate_per_s for server in placement.servers)


def test_what_is_played_decides() -> None:
    """Three of 0.31 would fit by the steady twin, and two do when played."""
    found = place(fleet_of([0.31] * 8))
    assert found.gpus == found.lower_bound == 4
    np.testing.assert_allclose(loads(found), 0.62)


def test_an_adapter_that_outgrows_a_server_has_replicas_with_equal_shares() -> None:
    found = place(fleet_of([1.7, 0.2]))
    shares = [share for server in found.servers for name, share in server.adapters if name == "a0"]
    assert shares == [0.5, 0.5]
    assert len({each["server"] for each in found.routes["a0"]}) == 2


def test_groups_are_kept_together_and_apart() -> None:
    rows = [{"adapter": f"a{i}", "rank": 8, "rate_per_s": 0.2} for i in range(6)]
    for index, group in ((0, {"together": "t"}), (5, {"together": "t"}), (1, {"apart": "x"}), (2, {"apart": "x"})):
        rows[index] |= group
    found = place(fleet_of([], {"adapters": rows}))
    at = {name: server.name for server in found.servers for name, _ in server.adapters}
    assert at["a0"] == at["a5"]
    assert at["a1"] != at["a2"]
    assert found.gpus == 2


def test_most_served_leaves_out_what_the_servers_do_not_hold() -> None:
    pool = {"name": "p", "calibration": LLAMA, "most_servers": 2}
    found = place(fleet_of([0.4] * 4 + [0.1] * 4, {"objective": "most-served", "pools": [pool]}))
    assert found.gpus == 2
    assert (found.lower_bound, found.gap) == (None, None)
    assert sum(loads(found)) == pytest.approx(1.8)  # 0.9 on each
    assert len(found.unplaced) == 8 - sum(len(server.adapters) for server in found.servers)


def test_servers_that_do_not_suffice_are_told() -> None:
    pool = {"name": "p", "calibration": LLAMA, "most_servers": 2}
    with pytest.raises(InfeasibleError, match="raise most_servers or lower headroom"):
        place(fleet_of([0.4] * 8, {"pools": [pool]}))


def test_a_group_that_fits_onto_no_server_is_told() -> None:
    rows = [{"adapter": f"a{i}", "rank": 8, "rate_per_s": 0.4, "together": "team"} for i in range(3)]
    with pytest.raises(InfeasibleError, match=r"together team: its 3 adapters \(1.2 requests/s\) fit onto no server"):
        place(fleet_of([], {"adapters": rows}))


def test_a_server_stands_by_where_one_may_fail() -> None:
    found = place(fleet_of([0.4] * 4, {"survive": 1}))
    assert (len(found.servers), found.gpus, found.lower_bound, found.cost_per_hour) == (2, 3, 3.0, 6.0)
    assert [(each.pool, sorted(each.takes_over)) for each in found.standby] == [
        ("p", sorted(server.name for server in found.servers))
    ]


def test_the_cheaper_pool_is_taken() -> None:
    pools = [{"name": name, "calibration": LLAMA, "price_per_hour": price} for name, price in (("a", 3), ("b", 2))]
    found = place(fleet_of([0.4] * 4, {"objective": "cheapest", "pools": pools}))
    assert [server.pool for server in found.servers] == ["b", "b"]
    assert (found.cost_per_hour, found.lower_bound) == (4.0, 4.0)


def test_balanced_servers_have_equal_headroom() -> None:
    found = place(fleet_of([0.2] * 3 + [0.05] * 4, {"objective": "balanced"}))
    assert len(found.servers) == 2
    low, high = loads(found)
    assert high <= 1.3 * low  # 0.45 and 0.35: a server has room for four adapters


def test_what_runs_now_moves_as_little_as_may_be(tmp_path: Path) -> None:
    """One of two servers has grown too busy: one adapter has to leave it, and the new one comes onto the other."""
    now = [["a0", "a1", "a2"], ["a3"]]
    servers = [
        {"name": f"gpu-{i}", "pool": "p", "adapters": [{"adapter": each, "share": 1.0} for each in names]}
        for i, names in enumerate(now)
    ]
    (tmp_path / "now.json").write_text(json.dumps({"servers": servers}), encoding="utf-8")
    assert read_placement(tmp_path / "now.json")[1] == ("gpu-1", "p", ["a3"])
    wanted = [0.4, 0.4, 0.4, 0.1, 0.2]
    found = place(fleet_of(wanted, {"current": "now.json", "max_moves": 1}, tmp_path))
    assert found.moves == 1
    at = {name: server.name for server in found.servers for name, _ in server.adapters}
    assert at["a3"] == at["a4"] == "gpu-1"
    assert sorted(at[f"a{i}"] for i in range(3)) == ["gpu-0", "gpu-0", "gpu-1"]
    with pytest.raises(InfeasibleError, match="max_moves 0 do not suffice: 1 adapters have to move"):
        place(fleet_of(wanted, {"current": "now.json", "max_moves": 0}, tmp_path))
