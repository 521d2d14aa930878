"""``lora-capacity profile``: the tables that a calibration is fitted from, measured on a real server."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_capacity.errors import InputError, LoraCapacityError
from lora_capacity.text import printable, printable_lines
from lora_capacity_cli.grouping import command
from lora_capacity_cli.options import FILE, examples, refuse_given
from lora_capacity_cli.output import print_facts, print_table, say
from lora_capacity_cli.servers import process_options

if TYPE_CHECKING:
    from lora_capacity_profiling.campaign import Campaign
    from lora_capacity_profiling.machine import Machine
    from lora_capacity_profiling.profiler import Profiler, Watcher

_RANDOM = "random-llama"
_S_PER_MINUTE = 60.0  # by definition


@command(
    epilog=examples(
        "lora-capacity profile meta-llama/Llama-3.1-8B-Instruct --config Llama/config.json --dry-run",
        "lora-capacity profile ./Llama-3.1-8B-Instruct -o my_profile --campaign standard",
        "lora-capacity profile --random-model --python vllm-cpu/bin/python -o my_profile",
        "lora-capacity fit my_profile -o calibration.json",
    )
)
@click.argument("model", required=False)
@click.option("-o", "--output", type=FILE, metavar="FOLDER", help="Profile folder to write or to resume.")
@click.option(
    "--campaign",
    metavar="NAME|FILE",
    help="Measurements: quick, standard, thorough, quick-cpu, or a YAML file. [default: quick, or quick-cpu]",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and its duration; measure nothing. Needs no vLLM.")
@click.option(
    "--random-model",
    is_flag=True,
    help="Profile a small model with random weights instead of MODEL; for vLLM's CPU build.",
)
@click.option(
    "--config",
    type=FILE,
    metavar="config.json",
    help="The model's config.json, if MODEL is not a folder that contains it.",
)
@process_options
@click.option("--url", metavar="URL", help="Profile a running server, as far as possible.")
@click.option(
    "--device", type=click.Choice(["gpu", "cpu"]), help="Device of the server. [default: detected with --python]"
)
@click.option("--max-loras", type=click.IntRange(min=0), help="With --url: slots of the server; 0 without LoRA.")
@click.option("--max-lora-rank", type=click.IntRange(min=1), help="With --url: rank of the server and its adapters.")
@click.option("--max-cpu-loras", type=click.IntRange(min=1), help="With --url: adapters kept in host memory.")
def profile(**given: Any) -> None:
    """Measure vLLM servers and write the folder that `fit` reads.

    MODEL is a name or a folder, as in `vllm serve`. Servers are started and stopped as the campaign needs them, with
    adapters of random weights. Every finished point is saved: after an interruption the same command resumes. Points
    that fail are recorded in profile.json; the same command tries them again.
    """
    from lora_capacity_profiling.errors import ServerError
    from lora_capacity_profiling.folder import ProfileFolder

    folder = given["output"]
    if folder is None and not given["dry_run"]:
        raise InputError("--output", None, "-o FOLDER, the profile folder to write")
    if given["url"] is not None:
        refuse_given(("environment", "timeout_s"), "--url", "it is for servers that are started")
    _campaign(given, given["device"])  # its faults are told before an interpreter is asked, which takes long
    machine = _machine(given)
    campaign = _campaign(given, machine.device)
    if given["dry_run"]:
        _print_plan(campaign, machine)
        return
    profiler = _profiler(given, campaign, machine, ProfileFolder(folder))
    _print_plan(campaign, machine, profiler)
    try:
        profiler.run()
    except KeyboardInterrupt:
        say(f"\ninterrupted; what is measured is in {folder}, and the same command goes on from there", err=True)
        raise
    failed = [each for each in profiler.folder.finished.values() if each.failure]
    if failed and len(failed) == len(profiler.folder.finished):
        raise ServerError(f"no point could be measured; {failed[0].id}: {failed[0].failure}")
    print_table("Failed points", [{"point": each.id, "reason": each.failure} for each in failed])
    say(f"Fit it: lora-capacity fit {shlex.quote(str(folder))} -o calibration.json")


def _machine(given: Mapping[str, Any]) -> "Machine":
    from lora_capacity_profiling.machine import Machine, look_at, this_cpu

    from lora_capacity.hardware import Gpu

    if given["url"] is not None and given["device"] == "cpu":
        return Machine("cpu", this_cpu(), "")
    try:
        found = look_at(given["python"])
    except LoraCapacityError as error:
        if not given["dry_run"]:
            raise
        say(f"warning: planned for any {given['device'] or 'gpu'}: {error}", err=True)
        return Machine(given["device"] or "gpu", Gpu("unknown", 1), "")
    if given["device"] not in (None, found.device):
        raise InputError("--device", given["device"], f"{found.device}, which vLLM there is for")
    return found


def _campaign(given: Mapping[str, Any], device: str | None) -> "Campaign":
    from lora_capacity_profiling.campaign import LIMITS, load_campaign

    name = given["campaign"] or "quick"
    name = "quick-cpu" if name == "quick" and device == "cpu" else name
    campaign = load_campaign(name)
    flags = dict(given["flags"])
    for name in LIMITS:
        if isinstance(flags.get(name), bool):
            raise InputError("--flag", name, "NAME=VALUE: a limit is no switch")
    return campaign.with_flags(flags, "--flag ")


def _profiler(given: Mapping[str, Any], campaign: "Campaign", machine: "Machine", folder: Any) -> "Profiler":
    from lora_capacity_profiling.material import check_profiled, write_model
    from lora_capacity_profiling.profiler import Launch, Profiler
    from lora_capacity_profiling.server import offline_variables

    from lora_capacity.models import ModelShape

    model = given["model"]
    if given["random_model"]:
        if model is not None:
            raise InputError("MODEL", model, "nothing beside --random-model")
        model = str(folder.path / "model" / _RANDOM)
        if not (Path(model) / "config.json").exists():
            write_model(Path(model))
    if model is None:
        raise InputError("MODEL", None, "the name or folder of a model, or --random-model")
    config = given["config"] or Path(model)
    if not config.exists():
        raise InputError("MODEL", model, "a folder with config.json", "of a model known by name, give its --config")
    if given["url"] is None and Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise InputError("MODEL", model, "a model's folder, which has a config.json")
    names = ("max_loras", "max_lora_rank", "max_cpu_loras")
    running = {name: given[name] for name in names if given[name] is not None}
    if running and given["url"] is None:
        raise InputError(f"--{next(iter(running)).replace('_', '-')}", next(iter(running.values())), "only with --url")
    launch = Launch(
        model=model,
        python=given["python"],
        environment={**offline_variables(model), **dict(given["environment"])},
        timeout_s=given["timeout_s"],
        url=given["url"],
        running=running,
    )
    shape = ModelShape.from_file(config)
    check_profiled(shape)
    command = _command_line()
    return Profiler(folder, campaign, shape, machine, launch, command=command, watcher=_watcher())


def _command_line() -> str:
    """Return the command as it was given, but for secrets."""
    from lora_capacity_profiling.secrets import command_without_secrets

    return shlex.join(["lora-capacity", *command_without_secrets(sys.argv[1:])])


def _print_plan(campaign: "Campaign", machine: "Machine", profiler: "Profiler | None" = None) -> None:
    from lora_capacity_profiling.planning import estimate_s, plan_servers

    plans = plan_servers(campaign) if profiler is None else profiler.plans
    rows, total_s = [], 0.0
    for plan in plans:
        points, needs_s = plan.points, estimate_s(campaign, plan.points, machine.device)
        if profiler is not None:
            points, needs_s = tuple(profiler.pending(plan)), profiler.estimate_server_s(plan)
        total_s += needs_s
        kinds = sorted({type(point).__name__ for point in points})
        row = {"server": plan.name, "adapters": sum(plan.adapters.values()), "points": len(points)}
        rows.append(row | {"kinds": ", ".join(kinds) or "–", "minutes": round(needs_s / _S_PER_MINUTE, 1)})
    print_table(f"Campaign {campaign.name}: {campaign.description}", rows)
    facts = {
        "machine": machine.gpu.name,
        "vLLM": machine.vllm_version or ("unknown until the server answers" if profiler else "unknown"),
        "time needed": f"about {_time(total_s)}",
    }
    if profiler is not None:
        done = sum(len(plan.points) - len(profiler.pending(plan)) for plan in plans)
        facts |= {"already measured": f"{done} points"} if done else {}
    print_facts("On", facts)


def _time(value_s: float) -> str:
    if value_s < 90:
        return f"{value_s:.0f} s"
    return f"{value_s / _S_PER_MINUTE:.0f} min" if value_s < 5400 else f"{value_s / 3600:.1f} h"


class _Screen:
    """Progress on stderr: on a terminal, lines that the next one overwrites; elsewhere only those that last."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._told: set[str] = set()

    def passing(self, text: str) -> None:
        if self._terminal:
            click.echo(f"\r\x1b[K{printable(text[:110])}", nl=False, err=True)

    def lasting(self, text: str) -> None:
        text = printable_lines(text)
        click.echo(f"\r\x1b[K{text}" if self._terminal else text, err=True)

    def pass_or_once(self, text: str, about: str) -> None:
        """Show a passing line; elsewhere than on a terminal its first one about a thing lasts."""
        if self._terminal:
            self.passing(text)
        elif about not in self._told:
            self._told.add(about)
            self.lasting(text)


def _watcher() -> "Watcher":
    """Return what tells on stderr how the profile goes on."""
    from lora_capacity_profiling.folder import Finished
    from lora_capacity_profiling.planning import ServerPlan
    from lora_capacity_profiling.profiler import Watcher

    screen = _Screen()

    class Teller(Watcher):
        def starting(self, plan: ServerPlan, elapsed_s: float, line: str) -> None:
            screen.passing(f"{plan.name}: starting, {elapsed_s:.0f} s  {line}")

        def started(self, plan: ServerPlan, start_s: float) -> None:
            screen.lasting(f"{plan.name}: up after {start_s:.0f} s")

        def stopping(self, plan: ServerPlan, elapsed_s: float, left: int) -> None:
            screen.pass_or_once(f"{plan.name}: waiting for {left} processes to end, {elapsed_s:.0f} s", plan.name)

        def measuring(self, point: str, left_s: float) -> None:
            screen.passing(f"{point} ... (about {_time(left_s)} left)")

        def measured(self, finished: Finished) -> None:
            screen.lasting(f"{finished.id}: {_outcome(finished)}")

    return Teller()


def _outcome(finished: Any) -> str:
    if finished.failure:
        return f"failed: {finished.failure}"
    if not finished.repeats:
        return f"{finished.row.get('status', 'done')}"
    ordered = sorted(finished.repeats)
    middle = f"{ordered[(len(ordered) - 1) // 2]:.4g} {finished.unit.replace('_per_', '/')}"
    repeats = f", {len(ordered)} repeats from {ordered[0]:.4g} to {ordered[-1]:.4g}" if len(ordered) > 1 else ""
    return middle + repeats
