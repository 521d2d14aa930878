"""The command ``lora-capacity``: one module per command; here they are gathered and failures become exit codes."""

import os
import sys
from typing import Any, NoReturn

import click

from lora_capacity.errors import InfeasibleError, LoraCapacityError
from lora_capacity_cli.calibrations import calibrations
from lora_capacity_cli.compare import compare
from lora_capacity_cli.fit import fit
from lora_capacity_cli.label import label
from lora_capacity_cli.memory import memory
from lora_capacity_cli.observe import observe
from lora_capacity_cli.optimize import optimize
from lora_capacity_cli.options import examples
from lora_capacity_cli.place import place
from lora_capacity_cli.predict import predict
from lora_capacity_cli.profile import profile
from lora_capacity_cli.report import report
from lora_capacity_cli.rules import rules
from lora_capacity_cli.simulate import simulate
from lora_capacity_cli.sweep import sweep
from lora_capacity_cli.train import train
from lora_capacity_cli.validate import validate
from lora_capacity_cli.verify import verify

INFEASIBLE = 1  # nothing feasible
BAD_INPUT = 2  # as click has it for wrong options
BROKEN_PIPE = 1  # the reader of the output has gone
INTERRUPTED = 128 + 2  # as shells report a process that SIGINT ended


class Commands(click.Group):
    """A group that tells expected failures in one line; bugs keep their traceback."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run and exit: 0 answered, 1 nothing feasible, 2 bad input, 130 interrupted."""
        try:
            code = super().main(*args, **extra | {"standalone_mode": False}) or 0
            sys.stdout.flush()
        except click.ClickException as error:
            code = _complain(error.format_message(), error.exit_code)
        except InfeasibleError as error:
            code = _complain(str(error), INFEASIBLE)
        except LoraCapacityError as error:
            for note in getattr(error, "__notes__", []):
                click.echo(note, err=True)
            code = _complain(str(error), BAD_INPUT)
        except click.Abort:
            code = INTERRUPTED
        except BrokenPipeError:
            # The reader has gone; without this Python would complain of it once more as it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = BROKEN_PIPE
        sys.exit(code)


def _complain(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


@click.group(
    epilog=examples(
        "lora-capacity optimize examples/few_busy.yaml",
    ),
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="lora-capacity", message="%(prog)s %(version)s")
def main() -> None:
    """Predict how many LoRA adapters one vLLM server can serve, and with how many slots on the GPU."""


COMMANDS = (
    *(memory, optimize, place, report, simulate, sweep, compare),
    *(label, train, rules, predict),
    *(validate, verify, observe, profile, fit, calibrations),
)

for command in COMMANDS:
    main.add_command(command)
