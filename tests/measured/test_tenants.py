"""Rates of real tenants over two weeks, as they stand in the shared table."""

from pathlib import Path

import numpy as np
import pytest

from lora_capacity.tables import Column, read_table
from lora_capacity.workload.over_time import read_rates


def test_rates_of_tenants_are_read_whole(measurements_dir: Path) -> None:
    folder = measurements_dir.parent / "tenants"
    if not folder.is_dir():
        pytest.skip(f"no rates of tenants in {folder}")
    columns = {name: Column() for name in ("mean_rate_per_s", "peak_rate_per_s", "active_windows")}
    told = read_table(folder / "tenants.csv", {"tenant": Column("text"), **columns})
    found = read_rates(folder / "tenant_rates.parquet", None, None)
    mean, peak, active = (dict(zip(told["tenant"], told[name], strict=True)) for name in columns)
    rates = found.mean_per_s * found.windows.factor
    assert found.windows.edges_s[-1] == 14 * 24 * 3600
    assert sorted(found.names) == sorted(name for name in told["tenant"] if active[name])
    np.testing.assert_allclose(found.mean_per_s, [mean[name] for name in found.names], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(rates.max(axis=0), [peak[name] for name in found.names], rtol=1e-3)
    np.testing.assert_array_equal((rates > 0).sum(axis=0), [active[name] for name in found.names])
