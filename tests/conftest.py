"""What all tests share: the measured tables, deterministic examples, array shapes checked as the library runs."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

if "PYTEST_XDIST_WORKER" not in os.environ:
    # What is compiled is shared by the workers of a run and the commands that they start, and gone after it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lora-capacity-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from tests.shapes import check_shapes

install_import_hook("lora_capacity", f"{check_shapes.__module__}.{check_shapes.__name__}")

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Shells start jobs in the background with interrupts ignored, which the programs under test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parents[1]
MEASUREMENTS = Path(os.environ.get("LORA_CAPACITY_MEASUREMENTS") or REPOSITORY.parent / "shared" / "measurements")
MOST_MAPPINGS = 10_000
MEASUREMENTS_REQUIRED = os.environ.get("LORA_CAPACITY_REQUIRE_MEASUREMENTS", "") not in ("", "0")


@pytest.fixture(scope="module", autouse=True)
def _few_compiled_programs() -> Generator[None]:
    """Drop compiled programs before the kernel's limit of a process's mappings ends it: each takes several."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def measurements_dir() -> Path:
    """Folder of the measured tables; a test that asks for it is skipped where they are absent."""
    if not MEASUREMENTS.is_dir():
        pytest.skip(f"no measured tables in {MEASUREMENTS}; LORA_CAPACITY_MEASUREMENTS names another folder")
    return MEASUREMENTS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "measurements_dir" in getattr(item, "fixturenames", ()) or "measured" in item.path.parts:
            item.add_marker("measured")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.get_closest_marker("measured"):
        _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if "measured" in collector.path.parts:
        _fail_if_skipped(report)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if MEASUREMENTS_REQUIRED and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped although LORA_CAPACITY_REQUIRE_MEASUREMENTS is set: {report.longrepr}"
