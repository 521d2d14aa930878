"""Outcome codes per configuration: traced code returns them where host code would raise."""

import enum

STARVED_SHORTFALL = 0.1
"""A server is starved when its throughput is at least this share below its offered load.

Source: definition of arXiv 2508.08343."""


class Status(enum.IntEnum):
    """What became of one configuration."""

    OK = 0
    """The server starts and the answer lies inside the calibration's ranges."""
    OUTSIDE_CALIBRATION = 1
    """The server starts; the answer extrapolates beyond the ranges that the calibration was fitted over."""
    NO_KV_CACHE = 2
    """vLLM refuses to start: the KV cache left is smaller than one request of ``max_model_len``."""
    OOM = 3
    """The server runs out of GPU memory while it starts."""
    STEP_LIMIT = 4
    """The simulation was cut off before its horizon."""

    @property
    def label(self) -> str:
        """Lower-case name as it stands in files and JSON."""
        return self.name.lower()

    @property
    def started(self) -> bool:
        """Whether the server starts, that is, whether there are numbers to report."""
        return self in (Status.OK, Status.OUTSIDE_CALIBRATION)
