"""What the commands that look for the best configuration share: their options, and the search itself."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_capacity_cli.options import (
    GRID,
    calibration_options,
    engine_options,
    goodput_options,
    recording_options,
    refuse_given,
    seeds_option,
    server_options,
    workload_argument,
)
from lora_capacity_cli.runtime import prepare, progress_bar, read_workload

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration
    from lora_capacity.search import Recommendation
    from lora_capacity.workload import Workload

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = {
    "adapters": click.option(
        "--adapters", type=GRID, help="Numbers of adapters to search. [default: all sensible ones]"
    ),
    "max_loras": click.option(
        "--max-loras", type=GRID, help="Numbers of slots to search. [default: all sensible ones]"
    ),
    "goal": click.option(
        "--objective",
        "goal",
        type=click.Choice(["goodput", "throughput", "fewest-slots", "most-adapters"]),
        default="goodput",
        show_default=True,
        help="What to optimize among servers that keep up within the bounds: goodput, fewest slots or most adapters. "
        "throughput ignores the bounds and takes the highest throughput that does not starve.",
    ),
    "within": click.option(
        "--within",
        type=float,
        default=0.01,
        show_default=True,
        help="With --objective fewest-slots: share of the best goodput that may be given up.",
    ),
    "starvation_threshold": click.option(
        "--starvation-threshold",
        type=float,
        default=0.1,
        show_default=True,
        help="With --objective throughput: a server starves if its throughput is this share below the offered load.",
    ),
    "risk": click.option(
        "--risk", type=float, default=0.05, show_default=True, help="Highest acceptable probability of overload."
    ),
}
_PASSED = ("adapters", "max_loras", "starvation_threshold", "risk", "engine", "seed", "seeds")
_SHARED = ("workload", "recording", "calibration", "bounds", "engine", "seed", "seeds", "settings")
SEARCH_ONLY = (*_OPTIONS.keys() - {"adapters", "max_loras"}, "engine", "seed", "seeds")
"""Options that say how to search, which change nothing where the configurations are given."""


def search_options(command: Command, *, derives: bool = True) -> Command:
    """Add the workload and all that narrows the search; the command gets them as ``question``, for `recommend`.

    Args:
        command: What gets them.
        derives: Whether a calibration can be derived.
    """

    @functools.wraps(command)
    def with_question(**given: Any) -> Any:
        if given["goal"] != "fewest-slots":
            refuse_given(("within",), f"--objective {given['goal']}", "it is for --objective fewest-slots")
        if given["goal"] != "throughput":
            refuse_given(("starvation_threshold",), f"--objective {given['goal']}", "it is for --objective throughput")
        question = {name: given.pop(name) for name in (*_SHARED, *_OPTIONS)}
        return command(**given, question=question)

    decorated: Any = engine_options(seeds_option(4)(server_options(grids=True)(with_question)), default="event")
    for option in reversed((recording_options, goodput_options, *_OPTIONS.values())):
        decorated = option(decorated)
    return workload_argument(calibration_options(decorated, derives=derives))


def recommend(question: dict[str, Any]) -> "tuple[Workload, Calibration, Recommendation]":
    """Look for the best configuration, with progress on a terminal.

    Args:
        question: What `search_options` gathered.

    Returns:
        The workload, as it is at the peak of traffic over time, and the calibration, and the recommendation.
    """
    prepare()
    from lora_capacity import search

    objective = search.Objective(goal=question["goal"], within=question["within"])
    asked = read_workload(question["workload"], question["bounds"], question["recording"])
    known = question["calibration"].load()
    settings = dict(question["settings"])
    axes = {name: settings.pop(name, None) for name in ("max_num_batched_tokens", "max_num_seqs")}
    with progress_bar("configurations") as progress:
        found = search.recommend(
            asked,
            known,
            **axes,
            objective=objective,
            settings=settings,
            progress=progress,
            **{name: question[name] for name in _PASSED},
        )
    return asked.at_peak(), known, found
