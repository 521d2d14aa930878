"""Reading, writing and searching the arrays of one server inside a loop that changes them in place.

What is slow in a loop over large arrays is copying them, and XLA copies where it cannot see that the old value is
not needed any more. Three habits avoid it: what is rare is a loop of at most one iteration (`seldom`), since a
conditional copies what it returns; what is read of an array that changes later is read `apart`; and where nothing else
orders the two, a write waits for the read (`after`).

The functions are written for one server. Under `jax.vmap`, a branch would turn into a selection between whole states;
here it asks whether *any* server takes it (`on_any`), and what it writes is masked for the others.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike
from jaxtyping import Bool, Int, Shaped

Result = TypeVar("Result")
Index = tuple[ArrayLike, ...]

PARTS = 8
"""Parts that a search goes through side by side: the int32 lanes of a 256-bit register."""


@custom_vmap
def on_any(when: Bool[Array, ""]) -> Bool[Array, ""]:
    """Return whether it holds on any of the servers side by side."""
    return when


@on_any.def_vmap
def _on_any_of_many(_size: int, _batched: Any, when: Array) -> tuple[Array, bool]:
    """What is returned has no axis of servers, so that branches on it stay branches."""
    return when.any(), False


def seldom(when: Bool[Array, ""], change: Callable[[Result], Result], values: Result) -> Result:
    """Return ``change(values)`` if ``when`` holds on any server, else the values.

    ``change`` itself has to leave servers alone on which it does not hold. It is a loop of at most one iteration, since
    a conditional would copy the values.
    """

    def once(carry: tuple[Array, Result]) -> tuple[Array, Result]:
        return jnp.zeros_like(carry[0]), change(carry[1])

    changed: Result = jax.lax.while_loop(lambda carry: carry[0], once, (on_any(when), values))[1]
    return changed


def when_any(when: Bool[Array, ""], function: Callable[[], Result]) -> Result:
    """Return ``function()`` if ``when`` holds on any server, else zeros."""
    shapes: Any = jax.eval_shape(function)

    def never() -> Result:
        nothing: Result = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return nothing

    result: Result = jax.lax.cond(on_any(when), function, never)
    return result


def apart(step: Int[Array, ""], function: Callable[[], Result]) -> Result:
    """Return ``function()``, computed once and before what it reads is changed.

    XLA computes what is cheap again in each place that uses it, and the scheduler is a long chain of cheap things; it
    does not look into a conditional. The condition holds always, since steps count from 1, which XLA cannot know.
    """
    return when_any(step > 0, function)


def put(values: Shaped[Array, "..."], when: Bool[Array, ""], index: Index, new: ArrayLike) -> Array:
    """Return ``values.at[index].set(new)`` where ``when`` holds."""
    return _changed(values, when, index, lambda old: jnp.asarray(new, old.dtype))


def add(values: Shaped[Array, "..."], when: Bool[Array, ""], index: Index, more: ArrayLike) -> Array:
    """Return ``values.at[index].add(more)`` where ``when`` holds."""
    return _changed(values, when, index, lambda old: old + jnp.asarray(more, old.dtype))


def _changed(values: Array, when: Array, index: Index, change: Callable[[Array], Array]) -> Array:
    """Change an element or a row in place where ``when`` holds.

    XLA would compile a scatter as a selection between the whole array, changed and unchanged.
    """
    whole = values.shape[len(index) :]
    start: list[ArrayLike] = [*(jnp.where(when, place, 0) for place in index), *(0 for _ in whole)]
    size = [1] * len(index) + list(whole)

    def once(values: Array) -> Array:
        old = jax.lax.dynamic_slice(values, start, size)
        new = jnp.broadcast_to(change(old.reshape(whole)), whole).reshape(size)
        return jax.lax.dynamic_update_slice(values, jnp.where(when, new, old), start)

    return seldom(when, once, values)


def after(read: Int[Array, ""], when: Bool[Array, ""]) -> Bool[Array, ""]:
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
    parts = next(number for number in range(min(PARTS, size), 0, -1) if size % number == 0)
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


def running_total(values: Shaped[Array, "n ..."]) -> Shaped[Array, "n ..."]:
    """Add up along the first axis, which is short."""
    totals = [values[0]]
    for i in range(1, values.shape[0]):
        totals.append(totals[-1] + values[i])
    return jnp.stack(totals)


def indices(values: Shaped[Array, "n ..."]) -> Int[Array, " n"]:
    """Number the first axis."""
    return jnp.arange(values.shape[0], dtype=jnp.int32)
