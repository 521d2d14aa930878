"""The event twin compiles in one piece, and where XLA cannot do that it still runs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.engines import SchedulerRules
from lora_capacity.run import compile as compiling
from lora_capacity.run.requests import draw_requests
from tests.examples import make_calibration, make_scenarios

UNKNOWN = {"xla_cpu_no_such_option": False}
LARGE = 2**22
"""Elements of an array that is too large for XLA to compile loops over it in one piece by itself."""


def loop(values: jax.Array) -> jax.Array:
    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        count, values = carry
        return count + 1, values.at[count & 63].multiply(2.0) + 1.0

    return jax.lax.while_loop(lambda carry: carry[0] < 1000, body, (jnp.int32(0), values))[1]


def functions_of(function: Callable[..., Any], options: dict[str, Any], folder: Path) -> list[str]:
    """Names of the functions in the code that XLA generates."""
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    jax.jit(function, compiler_options=options | dump).lower(jnp.ones(LARGE)).compile()
    code = "".join(path.read_text() for path in folder.glob("*no-opt.ll"))
    return re.findall(r"define [^@\n]*@(\S+?)\(", code)


def test_a_marked_loop_is_a_function_within_one_kernel(tmp_path: Path) -> None:
    """Otherwise the body is a sequence of kernels that a pool of threads runs one by one, 10 to 24 times slower."""
    marked = functions_of(compiling.in_one_piece(loop), dict(compiling.IN_ONE_PIECE), tmp_path / "marked")
    assert any(name.startswith("while") for name in marked)
    assert sum(name.endswith("_kernel") for name in marked) == 1
    unmarked = functions_of(loop, dict(compiling.IN_ONE_PIECE), tmp_path / "unmarked")
    assert not any(name.startswith("while") for name in unmarked)


@pytest.mark.slow
def test_an_option_that_xla_does_not_know_is_told_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    scenarios = make_scenarios(
        [2.0, 2.0], [0.2, 0.1], max_loras=np.full(jax.local_device_count(), 2), horizon_s=20.0, kv_cache_tokens=1e4
    )
    tables = jax.tree.map(np.asarray, draw_requests(scenarios, np.array([40]), np.array([20]), seed=0).tables)
    run_in_one_piece = compiling.compiled_twin.__wrapped__(SchedulerRules(), 16, 0)
    monkeypatch.setattr(compiling, "IN_ONE_PIECE", UNKNOWN)
    with pytest.warns(RuntimeWarning, match="does not know xla_cpu_no_such_option"):
        run_otherwise = compiling.compiled_twin.__wrapped__(SchedulerRules(), 16, 0)
    results = [
        run(make_calibration().costs, np.float32(0.0), scenarios, tables) for run in (run_in_one_piece, run_otherwise)
    ]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
