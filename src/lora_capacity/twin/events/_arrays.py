"""Reading and writing one element of each server, so that a loop changes its arrays in place.

Arrays that are searched have the servers as their last axis, ``[n, configs]``: `pick_across` and the like. Arrays of
which single elements are read have them as their first: `pick`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lora_capacity.twin.events._state import FAR, State

Result = TypeVar("Result")


def pick(values: Array, index: Array) -> Array:
    """Return one element of each server: ``values[config, index]``, values ``[configs, n, …]``."""
    configs, size = values.shape[:2]
    row = size * jnp.arange(configs, dtype=jnp.int32)
    return values.reshape(-1, *values.shape[2:]).at[row + index].get(mode="promise_in_bounds")


def pick_across(values: Array, index: Array) -> Array:
    """Return one element of each server: ``values[index, config]``, values ``[n, configs]``."""
    configs = values.shape[1]
    place = configs * index + jnp.arange(configs, dtype=jnp.int32)
    return values.reshape(-1).at[place].get(mode="promise_in_bounds")


def put(values: Array, when: Array, index: Array, new: ArrayLike, column: int | None = None) -> Array:
    """Replace ``values[config, index]`` where ``when`` holds."""
    place, flat = _place(values, when, index, column)
    changed: Array = flat.at[place].set(jnp.asarray(new, values.dtype), **_PLAIN)
    return changed.reshape(values.shape)


def add(values: Array, when: Array, index: Array, more: ArrayLike, column: int | None = None) -> Array:
    """Add to ``values[config, index]`` where ``when`` holds."""
    place, flat = _place(values, when, index, column)
    changed: Array = flat.at[place].add(jnp.asarray(more, values.dtype), **_PLAIN)
    return changed.reshape(values.shape)


def add_several(values: Array, when: Array, index: Array, more: ArrayLike) -> Array:
    """Add to ``values[config, index]`` where ``when`` holds, several times; both ``[times, configs]``."""
    configs, size = values.shape
    place = jnp.where(when, size * jnp.arange(configs, dtype=jnp.int32) + index, FAR)
    changed: Array = values.reshape(-1).at[place].add(jnp.asarray(more, values.dtype), mode="drop")
    return changed.reshape(values.shape)


def put_across(values: Array, when: Array, index: Array, new: ArrayLike) -> Array:
    """Replace ``values[index, config]`` where ``when`` holds."""
    changed: Array = (
        values.reshape(-1).at[_place_across(values, when, index)].set(jnp.asarray(new, values.dtype), **_PLAIN)
    )
    return changed.reshape(values.shape)


def add_across(values: Array, when: Array, index: Array, more: ArrayLike) -> Array:
    """Add to ``values[index, config]`` where ``when`` holds."""
    changed: Array = (
        values.reshape(-1).at[_place_across(values, when, index)].add(jnp.asarray(more, values.dtype), **_PLAIN)
    )
    return changed.reshape(values.shape)


_PLAIN: dict[str, Any] = {"mode": "drop", "unique_indices": True, "wrap_negative_indices": False}


def _place(values: Array, when: Array, index: Array, column: int | None) -> tuple[Array, Array]:
    configs, size = values.shape[:2]
    place = size * jnp.arange(configs, dtype=jnp.int32) + index
    if column is None:
        return jnp.where(when, place, FAR), values.reshape(-1, *values.shape[2:])
    return jnp.where(when, place * values.shape[2] + column, FAR), values.reshape(-1)


def _place_across(values: Array, when: Array, index: Array) -> Array:
    configs = values.shape[1]
    return jnp.where(when, configs * index + jnp.arange(configs, dtype=jnp.int32), FAR)


def after(read: Array, when: Array) -> Array:
    """Make a write wait for a read of the same array, or else the loop copies the array.

    Args:
        read: What was read, never negative.
        when: Whether to write.
    """
    return when & (read >= 0)


def total(values: Array) -> Array:
    """Add up over the first axis in int32."""
    return jnp.sum(values, axis=0, dtype=jnp.int32)


def places(values: Array) -> Array:
    """Number the first axis, ``[places, 1]``."""
    return jnp.arange(values.shape[0], dtype=jnp.int32)[:, None]


def seldom(when: Array, change: Callable[[Result], Result], values: Result) -> Result:
    """Return ``change(values)`` if ``when`` holds anywhere, else the values.

    It is a loop of at most one turn, since a conditional would copy them.
    """

    def once(carry: tuple[Array, Result]) -> tuple[Array, Result]:
        return jnp.zeros_like(carry[0]), change(carry[1])

    changed: Result = jax.lax.while_loop(lambda carry: carry[0], once, (jnp.any(when), values))[1]
    return changed


def apart(function: Callable[..., Result], s: State, *operands: Any) -> Result:
    """Return ``function(s, *operands)``, computed once.

    XLA computes what is cheap again in each place that uses it, and the scheduler is a long chain of cheap things; it
    does not look into a conditional. The condition holds always, which XLA cannot know.
    """
    shapes: Any = jax.eval_shape(function, s, *operands)

    def never(*_: Any) -> Result:
        nothing: Result = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return nothing

    result: Result = jax.lax.cond(s.step[0] > 0, function, never, s, *operands)
    return result
