from pathlib import Path

import pytest

from lora_capacity.errors import InputError
from lora_capacity.measurements.schemas import KV_CAPACITY, MEASURED_RUN_COLUMNS, RUN_COLUMNS, SERVING_RUNS

STARTS = "model,max_loras,max_lora_rank,kv_cache_tokens,model_load_gib,status\n"


def test_columns_that_no_command_uses_may_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "starts.csv"
    path.write_text(STARTS + "llama,8,16,4096,unknown,ok\nllama,64,16,,,oom\n")
    table = KV_CAPACITY.read(path)
    assert table["max_loras"].tolist() == [8, 64]
    assert "model_load_gib" not in table
    path.write_text(STARTS + "llama,8,16,-1,,ok\n")
    with pytest.raises(InputError, match=r"line 2, kv_cache_tokens: '-1' is not allowed; allowed: a number >= 0"):
        KV_CAPACITY.read(path)


def test_a_serving_run_says_what_was_run_and_what_was_measured() -> None:
    assert SERVING_RUNS.names == (*RUN_COLUMNS, *MEASURED_RUN_COLUMNS)
