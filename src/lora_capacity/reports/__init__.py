"""A recommendation with its surroundings as one HTML page, and as figures for papers."""

from lora_capacity.reports.data import ClassService
from lora_capacity.reports.plan_grid import Curve, PlanGrid
from lora_capacity.reports.report import Report, build_report, survey
from lora_capacity.reports.sensitivity import Change

__all__ = ["Change", "ClassService", "Curve", "PlanGrid", "Report", "build_report", "survey"]
