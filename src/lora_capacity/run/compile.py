"""The event twin compiled: on a CPU as one piece of code, on every local device its own share of a batch."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax import Array
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import Mesh, PartitionSpec

from lora_capacity.costs import Costs
from lora_capacity.engines import SchedulerRules
from lora_capacity.scenarios import Results, Scenarios
from lora_capacity.twins.events import RequestTables
from lora_capacity.twins.events.simulation import simulate_with_clients
from lora_capacity.twins.events.state import Clients

Result = TypeVar("Result")

IN_ONE_PIECE: Mapping[str, bool] = {"xla_cpu_use_fusion_emitters": False}
"""Options that `in_one_piece` needs: only the older code generator can compile whole loops."""


@functools.cache
def compiled_twin(rules: SchedulerRules, block_size: int, samples: int) -> Callable[..., tuple[Results, Array]]:
    """Return the compiled twin, which tells how many requests clients have sent, int32 ``[configs]``, besides.

    Each local device goes on with its own share until that is done.
    """

    def simulate(
        costs: Costs, warmup_s: Array, scenarios: Scenarios, arrival: Array, requests: RequestTables
    ) -> tuple[Results, Clients]:
        requests = dataclasses.replace(requests, arrival=arrival)
        return simulate_with_clients(costs, scenarios, requests, rules, block_size, warmup_s, samples)

    spec: Any = PartitionSpec
    split, whole = spec("configs"), spec()
    mesh = Mesh(np.array(jax.local_devices()), ("configs",))
    one_piece = jax.local_devices()[0].platform == "cpu" and is_taken(tuple(IN_ONE_PIECE.items()))
    shards = jax.shard_map(
        in_one_piece(simulate) if one_piece else simulate,
        mesh=mesh,
        in_specs=(whole, whole, split, split, split),
        out_specs=split,
        check_vma=False,
    )
    jitted = jax.jit(shards, donate_argnums=3, compiler_options=dict(IN_ONE_PIECE) if one_piece else None)

    def run(costs: Costs, warmup_s: Any, scenarios: Scenarios, requests: RequestTables) -> tuple[Results, Array]:
        others = dataclasses.replace(requests, arrival=requests.arrival[:, :0])
        results, clients = jitted(costs, warmup_s, scenarios, requests.arrival, others)
        return results, clients.sent

    return run


def in_one_piece(simulate: Callable[..., Result]) -> Callable[..., Result]:
    """Let XLA compile a function for a CPU as one piece of code.

    By default XLA:CPU runs a loop's body as hundreds of small tasks in a pool of threads, which takes longer than what
    they do. It compiles calls in one piece that it marks as small itself, as it does with loops over little memory.

    Source: ``xla/service/cpu/small_while_loop_hoisting_pass.cc`` and ``xla/service/call_inliner.cc``.
    """
    jitted, mark = jax.jit(simulate), cast(Any, set_xla_metadata)

    def call(*arguments: Any) -> Result:
        marked: Result = mark(jitted(*arguments), xla_cpu_small_call="true", inlineable="false")
        return marked

    return call


@functools.cache
def is_taken(options: tuple[tuple[str, Any], ...]) -> bool:
    """Say whether this XLA knows compiler options; warn if not, since what they speed up works without them."""
    try:
        jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "option" not in str(error):
            raise
        names = ", ".join(name for name, _ in options)
        warnings.warn(
            f"XLA of jax {jax.__version__} does not know {names}: the event twin runs 10 to 24 times slower",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
