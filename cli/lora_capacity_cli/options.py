"""Options that several commands share; server settings stand under the names of vLLM's flags."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from lora_capacity.errors import LARGEST_WHOLE, InputError
from lora_capacity_cli.completion import CALIBRATION, GPU, MODEL
from lora_capacity_cli.output import folded

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration

DEFAULT_CALIBRATION = "llama-3.1-8b-instruct-h100-64gb"
"""One of the two that come with the package: the model of the measurements that most readers know."""

MAX_GRID_VALUES = 10_000
"""Most values of one axis: a guard against a slip in ``start:stop:step``, above any number of adapters of a server."""

MAX_SEEDS = 1000
"""Most draws of one configuration: their mean then varies thirty times less than one does."""

_EXAMPLE_WIDTH = 72
"""Characters of a line of an example: with its margin it fits a terminal of 80."""

_EVENT_ONLY = ("seed", "seeds", "warmup_s", "samples", "drain")
"""Options that the event twin alone hears of: the steady twin draws no requests and follows no time."""

_BOUNDED = {key: key for key in ("ttft", "tpot", "e2el")}
"""What ``--goodput`` bounds, by vLLM's keys."""

Command = TypeVar("Command", bound=Callable[..., Any])


class Grid(click.ParamType):
    """Whole numbers from 1 on: ``8``, ``8,16,32`` or ``8:384:8`` (start:stop:step, the stop included)."""

    name = "grid"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return how help shows it."""
        return "GRID"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers, ascending, each once."""
        if isinstance(value, tuple):
            return value
        found: set[int] = set()
        for part in str(value).split(","):
            try:
                found.update(_numbers_of(part))
            except ValueError:
                allowed = f"whole numbers >= 1 such as 8 or 8,16,32 or 8:384:8, at most {MAX_GRID_VALUES}"
                self.fail(f"{value!r} is not allowed; allowed: {allowed}", param, ctx)
        return tuple(sorted(found))


def _numbers_of(part: str) -> range:
    """Return what one part of a grid stands for; ValueError if it is none."""
    start, *rest = (int(word) for word in part.split(":"))
    if len(rest) > 2:
        raise ValueError(part)
    stop, step = [*rest, 1][:2] if rest else (start, 1)
    numbers = range(start, stop + 1, step)
    if start < 1 or not 1 <= len(numbers) <= MAX_GRID_VALUES:
        raise ValueError(part)
    return numbers


class Modules(click.ParamType):
    """Target modules: a preset, or names with commas between."""

    name = "modules"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | tuple[str, ...]:
        """Return a preset as it is, names as a tuple."""
        if isinstance(value, tuple) or "," not in value:
            return value
        return tuple(name.strip() for name in value.split(","))


class Bound(click.ParamType):
    """A latency bound as in ``vllm bench serve --goodput``: ``ttft:1000``."""

    name = "bound"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return how help shows it."""
        return "KEY:MS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Return the key and the milliseconds."""
        if isinstance(value, tuple):
            return value
        key, _, bound_ms = value.partition(":")
        try:
            return _BOUNDED[key], float(bound_ms)
        except (KeyError, ValueError):
            allowed = "ttft:MS, tpot:MS or e2el:MS with milliseconds, such as ttft:1000"
            self.fail(f"{value!r} is not allowed; allowed: {allowed}", param, ctx)


class DealType(click.ParamType):
    """How requests are assigned to adapters: ``zipf:64`` or ``zipf:64:1.2`` (law, adapters, parameter)."""

    name = "deal"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return how help shows it."""
        return "LAW:ADAPTERS[:PARAMETER]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Return it as a workload file has it."""
        if isinstance(value, dict):
            return value
        law, *rest = value.split(":")
        try:
            deal = {"law": law, "adapters": int(rest[0])}
            return deal if len(rest) == 1 else deal | {"parameter": float(":".join(rest[1:]))}
        except (ValueError, IndexError):
            allowed = "uniform:ADAPTERS, zipf:ADAPTERS or dirichlet:ADAPTERS, the latter two with :PARAMETER if not 1"
            self.fail(f"{value!r} is not allowed; allowed: {allowed}", param, ctx)


class Ranks(click.ParamType):
    """Ranks, assigned round-robin: ``8,16,16``."""

    name = "ranks"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return how help shows it."""
        return "RANK,RANK..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the ranks."""
        if isinstance(value, list):
            return value
        try:
            return [int(each) for each in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not allowed; allowed: whole numbers with commas between", param, ctx)


GRID = Grid()
FILE = click.Path(path_type=Path)


def examples(*lines: str) -> str:
    """Return the end of a command's help: examples that click leaves as they are, line by line."""
    told = (f"  {part}" for line in lines for part in folded(line, _EXAMPLE_WIDTH).split("\n"))
    return "\n".join(("\b", "Example:" if len(lines) == 1 else "Examples:", *told))


workload_argument = click.argument("workload", type=FILE)

format_option = click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Print tables or a JSON document.",
)

emit_option = click.option(
    "--emit",
    type=click.Choice(["command", "config", "k8s"]),
    help="Print only what starts the server: the `vllm serve` command, a file for `vllm serve --config`, or a "
    "Kubernetes Deployment.",
)

_DERIVED = {
    "model": (MODEL, "DIR|NAME", "Model to derive a calibration for: its folder, its config.json, or its name."),
    "gpu": (GPU, "NAME", "With --model: GPU, such as L40S or A100-80GB."),
    "tensor_parallel_size": (click.IntRange(min=1), "N", "With --model: GPUs for tensor parallelism."),
    "quantization": (click.STRING, "SCHEME", "With --model: quantization of the weights. [default: from config.json]"),
    "kv_cache_dtype": (click.STRING, "TYPE", "With --model: data type of the KV cache. [default: auto]"),
    "vllm_version": (click.STRING, "VERSION", "With --model: vLLM version. [default: newest supported]"),
}


@dataclass(frozen=True)
class CalibrationChoice:
    """The calibration that a user asks for: one there is, or one to derive.

    Attributes:
        name: Name or file of one there is.
        derived: Names of options and their values, what to derive one from; empty: none is derived.
        specialized: Whether it is asked for servers with ``specialize_active_lora``.
    """

    name: str
    derived: tuple[tuple[str, Any], ...] = ()
    specialized: bool = False

    def load(self) -> "Calibration":
        """Read or derive it.

        Raises:
            InputError: If there is none of this name, model, GPU or layout is not known, or vLLM's version has no
                such flag.
        """
        from lora_capacity.calibration import load_calibration

        found = load_calibration(**dict(self.derived)) if self.derived else load_calibration(self.name)
        return found.specialized() if self.specialized else found


def derivation_options(command: Command) -> Command:
    """Add what a calibration is derived from; the command gets those given as ``derived``, by name."""

    @functools.wraps(command)
    def with_derived(**given: Any) -> Any:
        told = {name: given.pop(name) for name in _DERIVED}
        return command(**given, derived={name: value for name, value in told.items() if value is not None})

    decorated: Any = with_derived
    for name, (kind, metavar, text) in reversed(_DERIVED.items()):
        decorated = click.option(f"--{name.replace('_', '-')}", name, type=kind, metavar=metavar, help=text)(decorated)
    return decorated


def calibration_options(command: Command, *, derives: bool = True) -> Command:
    """Add ``--calibration`` and what one is derived from; the command gets a `CalibrationChoice` as ``calibration``.

    Args:
        command: What gets them.
        derives: Whether one can be derived: not where a real server is at hand, which has been profiled.
    """

    @functools.wraps(command)
    def with_choice(
        calibration: str,
        derived: Mapping[str, Any] | None = None,
        specialize_active_lora: bool = False,
        **given: Any,
    ) -> Any:
        if derived:
            refuse_given(("calibration",), "--model and --gpu", "they derive one")
            modules = click.get_current_context().params.get("target_modules")  # where the command has server settings
            derived = {**derived, **({"target_modules": modules} if modules else {})}
        choice = CalibrationChoice(calibration, tuple((derived or {}).items()), specialize_active_lora)
        return command(**given, calibration=choice)

    named = click.option(
        "--calibration",
        type=CALIBRATION,
        metavar="NAME|FILE",
        default=DEFAULT_CALIBRATION,
        show_default=True,
        help="Measured model and GPU: a name from `lora-capacity calibrations`, or a file written by `fit`.",
    )
    specialize = click.option(
        "--specialize-active-lora",
        is_flag=True,
        help="LoRA kernels run for the active adapters only, not for all slots (vLLM 0.16 or later).",
    )
    decorated: Any = named(specialize(derivation_options(with_choice)) if derives else with_choice)
    return decorated


_RECORDED = {
    "format": (
        "--trace-format",
        click.STRING,
        "Format of the columns: azure-llm, burstgpt, mooncake, servegen or access-log. [default: arrival_s, adapter, "
        "input_tokens, output_tokens]",
    ),
    "time_column": ("--time-column", click.STRING, "Column of arrival times (numbers or dates)."),
    "adapter_column": ("--adapter-column", click.STRING, "Column of adapter names."),
    "input_column": ("--input-column", click.STRING, "Column of prompt lengths."),
    "output_column": ("--output-column", click.STRING, "Column of output lengths."),
    "time_unit": (
        "--time-unit",
        click.Choice(["s", "ms", "us", "ns"]),
        "Unit of numeric arrival times. [default: from the column name or the format]",
    ),
    "base_model": ("--base-model", click.STRING, "Name that stands for the base model in the column of adapters."),
    "deal": ("--deal", DealType(), "Assign requests without an adapter at random: uniform:64, zipf:64, zipf:64:1.2."),
    "ranks": ("--ranks", Ranks(), "Ranks of the adapters, assigned round-robin from the most requested adapter on."),
}
"""Options of a recording by the keys of ``requests.trace``."""


def recording_options(command: Command) -> Command:
    """Add what the columns of a recording are; the command gets those given as ``recording``, for `read_workload`."""

    @functools.wraps(command)
    def with_recording(**given: Any) -> Any:
        told = {name: given.pop(f"trace_{name}") for name in _RECORDED}
        return command(**given, recording={name: value for name, value in told.items() if value is not None})

    decorated: Any = with_recording
    for name, (flag, kind, text) in reversed(_RECORDED.items()):
        decorated = click.option(flag, f"trace_{name}", type=kind, help=text)(decorated)
    return decorated


def refuse_given(names: Iterable[str], beside: str, remedy: str) -> None:
    """Refuse options of the running command that would change nothing.

    Args:
        names: Their parameters; those that the user has not given are let be.
        beside: What makes them change nothing, as the user wrote it (``--engine steady``).
        remedy: What they are for.

    Raises:
        InputError: Names the first one given.
    """
    ctx = click.get_current_context()
    for param in ctx.command.params:
        if param.name in names and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
            raise InputError(param.opts[-1], ctx.params[param.name], f"nothing beside {beside}", remedy)


def goodput_options(command: Command) -> Command:
    """Add ``--goodput`` and ``--attainment``; the command gets them as ``bounds``, for `read_workload`."""

    @functools.wraps(command)
    def with_bounds(**given: Any) -> Any:
        bounds = {name: given.pop(name) for name in ("goodput", "attainment")}
        return command(**given, bounds=bounds)

    goodput = click.option(
        "--goodput",
        type=Bound(),
        multiple=True,
        help="Latency bound (SLO) of each request, as in `vllm bench serve`: ttft, tpot or e2el in milliseconds. May "
        "be repeated. [default: from the workload, else ttft:2000]",
    )
    attainment = click.option(
        "--attainment",
        type=float,
        help="Share of requests that must keep all bounds. [default: from the workload, else 0.95]",
    )
    decorated: Any = goodput(attainment(with_bounds))
    return decorated


def engine_options(command: Command, *, reference: bool = False, default: str = "steady") -> Command:
    """Add ``--engine`` and ``--seed``; options of the event twin are refused beside the steady one.

    Args:
        command: What gets them.
        reference: Whether the engine can be the plain-Python reference.
        default: The engine where none is given.
    """

    @functools.wraps(command)
    def with_engine(**given: Any) -> Any:
        if given["engine"] == "steady":
            refuse_given(_EVENT_ONLY, "--engine steady", "it is for --engine event")
        return command(**given)

    engine = click.option(
        "--engine",
        type=click.Choice(["steady", "event", *["reference"] * reference]),
        default=default,
        show_default=True,
        help="Twin that predicts: steady (averages, instant) or event (simulates every engine step)"
        + ("; reference is the event twin in plain Python (minutes)." if reference else "."),
    )
    decorated: Any = engine(seed_option(with_engine))
    return decorated


def seed_option(command: Command) -> Command:
    """Add ``--seed``."""
    return click.option(
        "--seed",
        type=click.IntRange(min=0, max=LARGEST_WHOLE),
        default=0,
        show_default=True,
        help="Seed of the requests that the event twin simulates.",
    )(command)


def seeds_option(default: int) -> Callable[[Command], Command]:
    """Return what adds ``--seeds``, how often each configuration is run."""
    return click.option(
        "--seeds",
        type=click.IntRange(min=1, max=MAX_SEEDS),
        default=default,
        show_default=True,
        help="Simulations of each configuration, with seeds from --seed on.",
    )


def ray_option(command: Command) -> Command:
    """Add the cluster that does the work, as `lora_capacity_cli.runtime.prepare` takes it."""
    return click.option(
        "--ray",
        metavar="ADDRESS",
        help="Share the work among the cores of a Ray cluster: the one that this machine is in (auto, or its head's "
        "HOST:PORT), or one that is started here (local). Needs the extra lora-capacity[ray].",
    )(command)


def adapter_options(*, recommended: bool = False) -> Callable[[Command], Command]:
    """Add how many adapters there are on which tier; the command gets A as ``adapters``, S as ``max_loras``.

    Those of the others that are given it gets as ``tiers``, by the names of `build_scenarios`.

    Args:
        recommended: Whether A and S are those of a recommendation where they are not given; otherwise they must be,
            and may be 0.
    """
    least = 1 if recommended else None
    end = " [default: recommended by the steady twin]" if recommended else ""
    served = "Adapters served" + (f".{end}" if recommended else "; 0 for the base model alone.")
    slots = "Slots on the GPU" + (f".{end}" if recommended else "; 0 for a server without LoRA.")
    count = click.IntRange(min=least) if recommended else click.INT
    options = (
        click.option("--adapters", type=count, required=not recommended, metavar="A", help=served),
        click.option("--max-loras", type=count, required=not recommended, metavar="S", help=slots),
        click.option(
            "--max-cpu-loras",
            type=int,
            metavar="C",
            help="Adapters kept in host memory; others are read from disk on demand. [default: the larger of A and S]",
        ),
        click.option(
            "--loaded-at-start",
            is_flag=True,
            help="Load all adapters before the first request, as with `vllm serve --lora-modules`.",
        ),
    )

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_tiers(**given: Any) -> Any:
            early = given.pop("loaded_at_start") or None
            tiers = {"max_cpu_loras": given.pop("max_cpu_loras"), "loaded_at_start": early}
            return command(**given, tiers={name: value for name, value in tiers.items() if value is not None})

        decorated: Any = with_tiers
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def server_options(*, grids: bool, caches: bool = True) -> Callable[[Command], Command]:
    """Add vLLM's settings to a command, which gets those given as ``settings``, a dict by vLLM's names.

    Args:
        grids: Whether the batch limits may be grids; they are then tuples.
        caches: Whether what is asked knows of prefix caching.
    """
    batch: click.ParamType = GRID if grids else click.INT
    several = " A list is searched." if grids else ""
    options = {
        "max_lora_rank": (click.INT, "Largest rank that a slot holds. [default: smallest that fits all adapters]"),
        "max_num_seqs": (batch, f"Maximum concurrent sequences.{several}"),
        "max_num_batched_tokens": (batch, f"Token budget of a step.{several}"),
        "gpu_memory_utilization": (click.FLOAT, "Share of GPU memory that vLLM may use."),
        "max_model_len": (click.INT, "Maximum tokens of a request, prompt plus output."),
        "block_size": (click.INT, "Tokens per KV block."),
        "target_modules": (
            Modules(),
            "Adapted modules: all-linear, attention, or names separated by commas. vLLM before 0.19 reserves "
            "slots for all of them. [default: all-linear]",
        ),
        "watermark": (click.FLOAT, "Share of the KV blocks that an admission leaves free (vLLM 0.24 or later)."),
        "max_num_active_seqs": (click.INT, "Maximum running sequences, up to --max-num-seqs (vLLM 0.31 or later)."),
        "long_prefill_token_threshold": (click.INT, "Maximum tokens of a prompt in a step. [default: 0, no limit]"),
    }
    if caches:
        text = "Prefix caching; see requests.shared_prefix_tokens. [default: on]"
        options["enable_prefix_caching"] = (click.BOOL, text)

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_settings(**given: Any) -> Any:
            settings = {name: given.pop(name) for name in options}
            return command(**given, settings={name: value for name, value in settings.items() if value is not None})

        decorated: Any = with_settings
        for name, (kind, text) in reversed(options.items()):
            flag = f"--{name.replace('_', '-')}"
            if kind is click.BOOL:
                flag = f"{flag}/--no-{flag.removeprefix('--')}"
            decorated = click.option(flag, name, type=kind, default=None, help=text)(decorated)
        return decorated

    return decorate
