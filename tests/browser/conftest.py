"""A real browser, the built documentation behind a local server, and a report in a file.

Chromium is looked for on the path; ``LORA_CAPACITY_CHROMIUM`` names another. It is never downloaded, and these tests
fail where there is none. Screenshots are kept in ``build/screenshots``.
"""

import functools
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from lora_capacity import Workload, build_report, load_calibration, recommend

REPOSITORY = Path(__file__).parents[2]
SCREENSHOTS = REPOSITORY / "build" / "screenshots"
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    named = os.environ.get("LORA_CAPACITY_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(f"no browser: install Chromium ({', '.join(NAMES)} on the path) or set LORA_CAPACITY_CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found)
        yield started
        started.close()


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """Serve the documentation that ``make docs`` built."""
    folder = REPOSITORY / "site"
    if not (folder / "index.html").exists():
        pytest.fail("no documentation in site/: run `make docs` first")
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def report_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report in a file of its own."""
    workload = Workload.from_file(REPOSITORY / "examples" / "mixed_ranks.yaml")
    calibration = load_calibration("llama-3.1-8b-instruct-h100-64gb")
    report = build_report(workload, calibration, recommend(workload, calibration, engine="steady"))
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.html(note="mixed_ranks.yaml"), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Any]:
    """Open pages; at the end of the test none may have logged an error or asked for anything from elsewhere."""
    contexts, complaints = [], []

    def open_page(url: str, *, width: int = 1280, height: int = 900, **context: Any) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **context))
        page: Page = contexts[-1].new_page()
        home = url.split("/")[:3]
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if _foreign(request.url, home) else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def _foreign(url: str, home: list[str]) -> bool:
    return not url.startswith(("data:", "blob:")) and url.split("/")[:3] != home


def keep(page: Page, name: str, *, whole: bool = True) -> None:
    """Keep a screenshot as an artifact."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=whole)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of every request."""
