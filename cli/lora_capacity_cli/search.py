"""What the commands that look for the best configuration share: their options, and the search itself."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_capacity.units import MS_PER_S
from lora_capacity_cli.options import (
    GRID,
    calibration_option,
    engine_options,
    refuse_given,
    seeds_option,
    server_options,
    workload_argument,
)
from lora_capacity_cli.runtime import prepare, progress_bar

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration
    from lora_capacity.search import Recommendation
    from lora_capacity.workload import Workload

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = {
    "adapters": click.option(
        "--adapters", type=GRID, help="Numbers of adapters to consider. [default: all that can make sense]"
    ),
    "max_loras": click.option(
        "--max-loras", type=GRID, help="Numbers of slots to consider. [default: all that can make sense]"
    ),
    "goal": click.option(
        "--objective",
        "goal",
        type=click.Choice(["throughput", "fewest-slots", "most-adapters"]),
        default="throughput",
        show_default=True,
        help="What to look for among the configurations that are unlikely to starve.",
    ),
    "within": click.option(
        "--within",
        type=float,
        default=0.01,
        show_default=True,
        help="Share of the best throughput that fewest-slots may give up.",
    ),
    "max_itl_ms": click.option("--max-itl-ms", type=float, help="Longest mean inter-token latency allowed."),
    "max_ttft_ms": click.option("--max-ttft-ms", type=float, help="Longest mean time to first token allowed."),
    "starvation_threshold": click.option(
        "--starvation-threshold",
        type=float,
        default=0.1,
        show_default=True,
        help="Share below the offered load from which on throughput counts as starved.",
    ),
    "risk": click.option(
        "--risk", type=float, default=0.05, show_default=True, help="Highest acceptable probability of starving."
    ),
}
_PASSED = ("adapters", "max_loras", "starvation_threshold", "risk", "engine", "seed", "seeds")
_SHARED = ("workload", "calibration", "engine", "seed", "seeds", "settings")
SEARCH_ONLY = (*_OPTIONS.keys() - {"adapters", "max_loras"}, "engine", "seed", "seeds")
"""Options that say how to search, which change nothing where the configurations are given."""


def search_options(command: Command) -> Command:
    """Add the workload and all that narrows the search; the command gets them as ``question``, for `recommend`."""

    @functools.wraps(command)
    def with_question(**given: Any) -> Any:
        if given["goal"] != "fewest-slots":
            refuse_given(("within",), f"--objective {given['goal']}", "it is for --objective fewest-slots")
        question = {name: given.pop(name) for name in (*_SHARED, *_OPTIONS)}
        return command(**given, question=question)

    decorated: Any = server_options(grids=True)(with_question)
    for option in reversed(
        (workload_argument, calibration_option, *_OPTIONS.values(), engine_options, seeds_option(2))
    ):
        decorated = option(decorated)
    return decorated


def recommend(question: dict[str, Any]) -> "tuple[Workload, Calibration, Recommendation]":
    """Look for the best configuration, with progress on a terminal.

    Args:
        question: What `search_options` gathered.

    Returns:
        The workload and the calibration read, and the recommendation.
    """
    prepare()
    from lora_capacity import search
    from lora_capacity.calibration import load_calibration
    from lora_capacity.workload import Workload

    bounds_s = {
        f"max_{name}_s": None if bound_ms is None else bound_ms / MS_PER_S
        for name, bound_ms in (("itl", question["max_itl_ms"]), ("ttft", question["max_ttft_ms"]))
    }
    objective = search.Objective(goal=question["goal"], within=question["within"], **bounds_s)
    path: Path = question["workload"]
    asked = Workload.from_file(path)
    known = load_calibration(question["calibration"])
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
    return asked, known, found
