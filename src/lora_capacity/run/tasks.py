"""One task for many items: in threads of this process, or wherever `lora_capacity.run.cluster` sends them."""

import functools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

Elsewhere = Callable[[Callable[[Any], Any], Sequence[Any], Callable[[Any], None], int], list[Any]]
"""What runs a task elsewhere: given it, its items, what to call as each ends, and how many items go together."""

ELSEWHERE: ContextVar[Elsewhere | None] = ContextVar("ELSEWHERE", default=None)
"""Where tasks are run, if not here."""

MOST_THREADS: ContextVar[float] = ContextVar("MOST_THREADS", default=float("inf"))
"""Threads that this process may use: a worker of a cluster has one of its node's cores."""


def run_tasks(
    task: Callable[[Item], Result],
    items: Sequence[Item],
    finished: Callable[[Result], None],
    *,
    threads: int,
    together: int = 1,
) -> list[Result]:
    """Run a task for every item, and return the results in the order of the items.

    What is under way here when interrupted is finished, and nothing more begun.

    Args:
        task: What to do with an item; on a cluster it is pickled.
        items: The items; nothing of an answer may depend on where, when or beside which others they are run.
        finished: Called in this thread with each result, in the order in which they come.
        threads: Items that are worth running at the same time in this process.
        together: Items that are worth the way to another machine; fewer are run here.
    """
    elsewhere = ELSEWHERE.get()
    if elsewhere is not None and len(items) > together:
        return elsewhere(task, items, finished, together)
    if (threads := int(min(threads, len(items), MOST_THREADS.get()))) <= 1:
        return [_told(task(item), finished) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(task, item) for item in items]
        waiting = set(futures)
        try:
            for future in as_completed(futures):
                waiting.remove(future)
                finished(future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            for future in waiting:
                if not future.cancelled() and future.exception() is None:
                    finished(future.result())
            raise
    return [future.result() for future in futures]


def _told(result: Result, finished: Callable[[Result], None]) -> Result:
    finished(result)
    return result


class Remembered(Generic[Result]):
    """A function whose latest answers are kept; pickled, it arrives without them.

    Args:
        function: The function, of arguments that can be hashed.
        size: Answers kept.
    """

    def __init__(self, function: Callable[..., Result], size: int) -> None:
        self._made_of = function, size
        self._kept = functools.lru_cache(size)(function)

    def __call__(self, *given: Hashable) -> Result:
        """Return what the function says."""
        return self._kept(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return Remembered, self._made_of
