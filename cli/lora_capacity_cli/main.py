"""The command ``lora-capacity``: one module per command; here they are gathered and failures become exit codes."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

from lora_capacity.errors import ImpossibleResultError, InfeasibleError, LoraCapacityError
from lora_capacity_cli.calibrations import calibrations
from lora_capacity_cli.compare import compare
from lora_capacity_cli.cost import cost
from lora_capacity_cli.fit import fit
from lora_capacity_cli.label import label
from lora_capacity_cli.memory import memory
from lora_capacity_cli.observe import observe
from lora_capacity_cli.optimize import optimize
from lora_capacity_cli.options import examples
from lora_capacity_cli.output import say, speak_any_encoding
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

INFEASIBLE = 1  # nothing feasible, and nothing else
BAD_INPUT = 2  # as click has it for wrong options
FAULT = 70  # a fault of this program: EX_SOFTWARE of sysexits.h
NO_OUTPUT = 74  # the output cannot be written: EX_IOERR
INTERRUPTED = 128 + 2  # as shells report a process that SIGINT ended
BROKEN_PIPE = 128 + 13  # the reader of the output has gone, as SIGPIPE
AGAIN_S = 0.05  # by then Python is out of the code that swallowed an interrupt


class Commands(click.Group):
    """A group that tells expected failures in one line; bugs keep their traceback."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run and exit: 0 answered, 1 nothing feasible, 2 bad input, 130 interrupted; the rest as named above."""
        if sys.stderr is None:  # closed by whoever started this
            sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the process ends
        if sys.stdout is None:
            sys.exit(_complain("stdout is closed: there is nowhere to answer to", NO_OUTPUT))
        stdout = sys.stdout
        speak_any_encoding()
        warnings.showwarning = _warn
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _interrupt_again
        try:
            code = super().main(*args, **extra | {"standalone_mode": False}) or 0
            sys.stdout.flush()
        except SystemExit as error:
            # Where the reader has gone, click puts another stdout in place of this one and ends with 1.
            code = error.code if sys.stdout is stdout else BROKEN_PIPE
        except KeyboardInterrupt:  # after click's own part, which tells of it by `click.Abort`
            code = INTERRUPTED
        except Exception as error:  # the traceback of those that are not expected is printed
            code = INTERRUPTED if _interrupted_import(error) else _told(error)
        if code in (BROKEN_PIPE, NO_OUTPUT):
            _forget_stdout()
        sys.exit(code)


def _interrupt_again(swallowed: "sys.UnraisableHookArgs") -> None:
    """Interrupt once more if Python has swallowed an interrupt, as it does where one meets the garbage collector."""
    if isinstance(swallowed.exc_value, KeyboardInterrupt):
        threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(swallowed)


def _interrupted_import(error: BaseException | None) -> bool:
    """Say whether an error is what a module being loaded made of an interrupt."""
    of_import = isinstance(error, ImportError)
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return of_import and error is not None


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Tell a warning of the library in one line, without the place in its code."""
    say(f"warning: {message}", err=True)


def _told(error: Exception) -> int:
    """Tell a failure on stderr, and return its exit code."""
    if isinstance(error, click.ClickException):
        return _complain(error.format_message(), error.exit_code)
    if isinstance(error, LoraCapacityError):
        for note in getattr(error, "__notes__", []):
            say(note, err=True)
        codes = {InfeasibleError: INFEASIBLE, ImpossibleResultError: FAULT}
        return _complain(str(error), codes.get(type(error), BAD_INPUT))
    if isinstance(error, click.Abort):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    if isinstance(error, MemoryError):
        return _complain("there is not enough memory for this", FAULT)
    if isinstance(error, OSError):  # what is read is checked where it is read
        where = "the output" if error.filename is None else str(error.filename)
        return _complain(f"{where} cannot be written: {error.strerror or error}", NO_OUTPUT)
    import traceback

    traceback.print_exception(error)
    return FAULT


def _forget_stdout() -> None:
    """Let what is left to write go nowhere; Python would complain of it once more as it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # nobody listens
        say(f"error: {' '.join(message.split())}", err=True)
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
    """Predict how many LoRA adapters a vLLM server can serve, and with how many slots on the GPU."""


COMMANDS = (
    *(memory, optimize, place, report, simulate, cost, sweep, compare),
    *(label, train, rules, predict),
    *(validate, verify, observe, profile, fit, calibrations),
)

for command in COMMANDS:
    main.add_command(command)
