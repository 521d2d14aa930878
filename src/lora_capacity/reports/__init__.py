"""A recommendation with its surroundings as one HTML page, and as figures for papers."""

from lora_capacity.reports.plan_grid import Curve, Landscape
from lora_capacity.reports.report import ClassService, Report, build_report, survey
from lora_capacity.reports.sensitivity import Change

__all__ = ["Change", "ClassService", "Curve", "Landscape", "Report", "build_report", "survey"]
