"""Reading and writing one element of each server, so that a loop changes its arrays in place.

Arrays that are searched have the servers as their last axis, ``[n, configs]``: `pick_across` and the like. Arrays of
which single elements are read have them as their first: `pick`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lora_capacity.twins.events.state import State

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


def put(values: Array, when: Array, index: Array, new: ArrayLike) -> Array:
    """Replace ``values[config, index]`` where ``when`` holds."""
    flat = values.reshape(-1, *values.shape[2:])
    return _put_flat(flat, when, _own_place(values, when, index), new).reshape(values.shape)


def put_across(values: Array, when: Array, index: Array, new: ArrayLike) -> Array:
    """Replace ``values[index, config]`` where ``when`` holds."""
    return _put_flat(values.reshape(-1), when, _own_place_across(values, when, index), new).reshape(values.shape)


def add(values: Array, when: Array, index: Array, more: ArrayLike, column: int | None = None) -> Array:
    """Add to ``values[config, index]`` where ``when`` holds."""
    place, flat = _own_place(values, when, index), values.reshape(-1, *values.shape[2:])
    if column is not None:
        place, flat = place * values.shape[2] + column, values.reshape(-1)
    return _add_flat(flat, when, place, more).reshape(values.shape)


def add_across(values: Array, when: Array, index: Array, more: ArrayLike) -> Array:
    """Add to ``values[index, config]`` where ``when`` holds."""
    return _add_flat(values.reshape(-1), when, _own_place_across(values, when, index), more).reshape(values.shape)


def add_several(values: Array, when: Array, index: Array, more: ArrayLike) -> Array:
    """Add to ``values[config, index]`` where ``when`` holds, several times; both ``[times, configs]``."""
    flat = values.reshape(-1)
    for i in range(index.shape[0]):
        flat = _add_flat(flat, when[i], _own_place(values, when[i], index[i]), more)
    return flat.reshape(values.shape)


def _own_place(values: Array, when: Array, index: Array) -> Array:
    configs, size = values.shape[:2]
    return size * jnp.arange(configs, dtype=jnp.int32) + jnp.where(when, index, 0)


def _own_place_across(values: Array, when: Array, index: Array) -> Array:
    configs = values.shape[1]
    return configs * jnp.where(when, index, 0) + jnp.arange(configs, dtype=jnp.int32)


def _put_flat(flat: Array, when: Array, place: Array, new: ArrayLike) -> Array:
    """Replace ``flat[place]`` where ``when`` holds; the others are written as they are."""
    new = jnp.broadcast_to(jnp.asarray(new, flat.dtype), (*place.shape, *flat.shape[1:]))
    return _changed(flat, when, place, lambda old, new: new, new)


def _add_flat(flat: Array, when: Array, place: Array, more: ArrayLike) -> Array:
    more = jnp.broadcast_to(jnp.asarray(more, flat.dtype), (*place.shape, *flat.shape[1:]))
    return _changed(flat, when, place, jnp.add, more)


def _changed(flat: Array, when: Array, place: Array, change: Callable[[Array, Array], Array], operand: Array) -> Array:
    """Replace ``flat[place]`` by what ``change`` makes of it where ``when`` holds; elsewhere by what it was.

    For one server it is a branch: XLA would select from the whole array, changed and unchanged.
    """
    if place.size == 1:

        def once(flat: Array) -> Array:
            old = jax.lax.dynamic_slice_in_dim(flat, place[0], 1)
            return jax.lax.dynamic_update_slice_in_dim(flat, change(old, operand), place[0], 0)

        return seldom(when, once, flat)
    old = flat.at[place].get(mode="promise_in_bounds")
    held = when.reshape(*when.shape, *(1,) * (flat.ndim - 1))
    written: Array = flat.at[place].set(
        jnp.where(held, change(old, operand), old), mode="promise_in_bounds", unique_indices=True
    )
    return written


def after(read: Array, when: Array) -> Array:
    """Make a write wait for a read of the same array, or else the loop copies the array.

    Args:
        read: What was read, never negative.
        when: Whether to write.
    """
    return when & (read >= 0)


def total(*arrays: Array, of: Callable[..., Array] = jnp.asarray) -> Array:
    """Add up ``of(*arrays)`` over the first axis in int32."""
    return _folded(jnp.add, lambda *parts: of(*parts).astype(jnp.int32), arrays)


def least(*arrays: Array, of: Callable[..., Array] = jnp.asarray) -> Array:
    """Return the smallest of ``of(*arrays)`` along the first axis."""
    return _folded(jnp.minimum, of, arrays)


def largest(*arrays: Array, of: Callable[..., Array] = jnp.asarray) -> Array:
    """Return the largest of ``of(*arrays)`` along the first axis."""
    return _folded(jnp.maximum, of, arrays)


def _folded(combine: Callable[[Array, Array], Array], of: Callable[..., Array], arrays: tuple[Array, ...]) -> Array:
    """Combine along the first axis part by part: on CPUs XLA's own reductions are not vectorised.

    What is combined is made of parts of the arrays, so that nothing as long as they are is written.
    """
    size = arrays[0].shape[0]
    parts = next(number for number in range(min(8, size), 0, -1) if size % number == 0)
    length = size // parts
    folded = functools.reduce(
        combine, (of(*(values[i * length : (i + 1) * length] for values in arrays)) for i in range(parts))
    )
    odd: list[Array] = []
    while (size := folded.shape[0]) > 1:
        if size % 2:
            odd.append(folded[-1])
        folded = combine(folded[: size // 2], folded[size // 2 : size // 2 * 2])
    return functools.reduce(combine, odd, folded[0])


def running_total(values: Array) -> Array:
    """Add up along the first axis, which is short."""
    totals = [values[0]]
    for i in range(1, values.shape[0]):
        totals.append(totals[-1] + values[i])
    return jnp.stack(totals)


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


def read(s: State, values: Array, index: Array) -> Array:
    """Return what `pick` does, read before the array changes."""
    return apart(lambda _, values, index: pick(values, index), s, values, index)


def when_any(when: Array, function: Callable[[], Result]) -> Result:
    """Return ``function()`` if ``when`` holds anywhere, else zeros."""
    shapes: Any = jax.eval_shape(function)

    def never() -> Result:
        nothing: Result = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return nothing

    result: Result = jax.lax.cond(jnp.any(when), function, never)
    return result


def apart(function: Callable[..., Result], s: State, *operands: Any) -> Result:
    """Return ``function(s, *operands)``, computed once.

    XLA computes what is cheap again in each place that uses it, and the scheduler is a long chain of cheap things; it
    does not look into a conditional. The condition holds always, which XLA cannot know.
    """
    return when_any(s.step > 0, lambda: function(s, *operands))
