"""What the commands that ask a surrogate share."""

from typing import TYPE_CHECKING

import click

from lora_capacity_cli.completion import CALIBRATION
from lora_capacity_cli.options import DEFAULT_CALIBRATION

if TYPE_CHECKING:
    from lora_capacity.calibration import Calibration
    from lora_capacity.surrogate import Surrogate

surrogate_option = click.option(
    "--surrogate",
    type=CALIBRATION,
    metavar="NAME|FILE",
    default=DEFAULT_CALIBRATION,
    show_default=True,
    help="Surrogate: the name of a bundled one, or a file written by `train`.",
)

calibration_of_option = click.option(
    "--calibration",
    type=CALIBRATION,
    metavar="NAME|FILE",
    help="Calibration of the surrogate. [default: bundled, by the name in the surrogate]",
)


def load_both(surrogate: str, calibration: str | None) -> "tuple[Surrogate, Calibration]":
    """Read a surrogate and its calibration."""
    from lora_capacity.calibration import load_calibration
    from lora_capacity.surrogate import load_surrogate

    model = load_surrogate(surrogate)
    return model, load_calibration(calibration or model.calibration)
