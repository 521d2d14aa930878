"""The report in a browser: what it shows, what its controls do, and that everybody can use it."""

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from tests.browser.conftest import SCREENSHOTS, keep

pytestmark = pytest.mark.browser

PHONE = {"width": 390, "height": 844}
CELL = ".map.wide .cells rect"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{}, PHONE], ids=["desk", "phone"])
def test_report_is_accessible_in_every_dress(opened: Any, report_url: str, scheme: str, size: dict) -> None:
    page = opened(report_url, color_scheme=scheme, **size)
    keep(page, f"report-{scheme}-{'phone' if size else 'desk'}")
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_sticks_out_sideways(opened: Any, report_url: str, width: int) -> None:
    page = opened(report_url, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_toggle_recolours_the_map_and_its_legend(opened: Any, report_url: str) -> None:
    page = opened(report_url)
    before = _classes(page)
    legend = page.locator(".map.wide .legend-name")
    assert legend.text_content() == "Throughput, tokens/s"
    page.get_by_role("radio", name="Time to first token").check(force=True)
    assert legend.text_content() == "Time to first token, s"
    assert _classes(page) != before
    assert page.locator(".readout dd.on").get_attribute("data-metric") == "ttft_s"
    assert page.locator(".map.wide .note.bound").text_content() == "dashed: bound on TTFT: 2 s"
    assert page.locator(".map.wide .limit.bound").get_attribute("d").startswith("M")
    keep(page, "report-toggled", whole=False)
    page.get_by_role("radio", name="Throughput").check(force=True)
    assert _classes(page) == before
    assert page.locator(".map.wide .limit.bound").get_attribute("d") == ""  # there is no bound on throughput


def test_hovering_a_cell_tells_it_and_leaving_tells_the_recommendation(opened: Any, report_url: str) -> None:
    page = opened(report_url)
    title, verdict = page.locator(".readout h3"), page.locator(".readout .verdict")
    recommended = title.text_content()
    assert verdict.text_content().startswith("recommended")
    page.locator(CELL).last.hover(force=True)
    assert title.text_content() != recommended
    assert page.locator(".map.wide .cursor").is_visible()
    page.locator("h1").hover()
    assert title.text_content() == recommended


def test_map_is_read_with_the_keyboard(opened: Any, report_url: str) -> None:
    page = opened(report_url)
    title = page.locator(".readout h3")
    before = title.text_content()
    page.locator(".map.wide").focus()
    # Slots first: where every adapter has one, no server has as many slots and fewer adapters.
    page.keyboard.press("ArrowDown")
    fewer = title.text_content()
    assert fewer.split(", ")[1] != before.split(", ")[1]
    page.keyboard.press("ArrowLeft")
    assert int(title.text_content().split()[0]) < int(fewer.split()[0])
    page.keyboard.press("Escape")
    assert title.text_content() == before


def test_hovering_a_curve_tells_all_of_its_group(opened: Any, report_url: str) -> None:
    page = opened(report_url)
    assert page.locator(".tip:visible").count() == 0
    panel = page.locator('.panel[data-key="adapters-itl_s"]')
    panel.scroll_into_view_if_needed()
    panel.hover(position={"x": 250, "y": 100})
    assert page.locator(".tip:visible").count() == page.locator('.panel[data-group="adapters"]').count()
    assert "ms" in page.locator(".tip:visible").nth(1).text_content()
    keep(page, "report-curve-hover", whole=False)


def test_command_can_be_copied_and_colours_changed(opened: Any, report_url: str) -> None:
    page = opened(report_url, permissions=["clipboard-read", "clipboard-write"])
    page.locator(".command button").click()
    page.wait_for_function("document.querySelector('.command button').textContent !== 'Copy'")
    before = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.locator(".theme").click()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != before


def test_without_scripts_all_is_there_but_the_controls(opened: Any, report_url: str) -> None:
    page = opened(report_url, java_script_enabled=False)
    assert page.locator(".map.wide").is_visible()
    assert not page.locator(".metrics").is_visible()
    assert not page.locator(".command button").is_visible()
    assert page.locator(".readout dd").first.text_content() != ""


def test_on_paper(opened: Any, report_url: str) -> None:
    page = opened(report_url, color_scheme="dark")
    page.emulate_media(media="print")
    assert not page.locator(".metrics").is_visible()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(252, 252, 250)"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.pdf(path=SCREENSHOTS / "report.pdf", print_background=False, format="A4")


def _classes(page: Page) -> list[str]:
    found: list[str] = page.locator(CELL).evaluate_all("cells => cells.map(cell => cell.getAttribute('class'))")
    return found
