"""The built documentation in a browser: every page, its links, its search."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.browser.conftest import REPOSITORY, keep

pytestmark = pytest.mark.browser

SITE = REPOSITORY / "site"
SHOWN = (
    "",
    "how-it-works/",
    "how-to/read-a-report/",
    "cli/",
    "accuracy/",
    "event-accuracy/",
    "benchmarks/",
    "api/optimize/",
    "tutorials/python-and-jax/",
    "cli-reference/",
)


def pages() -> list[str]:
    """Return every page of the built documentation, relative to its root."""
    return sorted(path.parent.relative_to(SITE).as_posix() for path in SITE.rglob("index.html"))


def test_every_page_loads_without_a_complaint(opened: Any, site: str) -> None:
    found = pages()
    assert len(found) > 10
    for name in found:
        page = opened(f"{site}/{name}/".replace("/./", "/"))
        assert page.locator("h1").count() == 1, name


def test_links_lead_somewhere() -> None:
    broken = []
    for path in SITE.rglob("*.html"):
        content = path.read_text(encoding="utf-8")
        for link in re.findall(r'(?:href|src)="([^"]+)"', content):
            target = urlsplit(unquote(link.replace("&amp;", "&")))
            if target.scheme or target.netloc or path.name == "404.html":
                continue
            place = (path.parent / target.path).resolve() if target.path else path
            place = place / "index.html" if place.is_dir() else place
            if not place.is_file() or (target.fragment and not _has(place, target.fragment)):
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert broken == []


def test_search_finds_what_is_written(opened: Any, site: str) -> None:
    page = opened(site)
    page.locator("input.md-search__input").click()
    page.keyboard.type("max_cpu_loras")
    page.wait_for_selector(".md-search-result__item")
    keep(page, "site-search", whole=False)
    assert page.locator(".md-search-result__item").count() > 1
    page.locator(".md-search-result__link").first.click()
    page.wait_for_load_state()
    assert "max_cpu_loras" in page.locator("article").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", SHOWN)
def test_pages_are_accessible(opened: Any, site: str, name: str, scheme: str) -> None:
    page = opened(f"{site}/{name}", color_scheme=scheme)
    keep(page, f"site-{name.strip('/').replace('/', '-') or 'start'}-{scheme}")
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_pages_fit_a_phone(opened: Any, site: str) -> None:
    for name in SHOWN:
        page = opened(f"{site}/{name}", width=390, height=844)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    keep(page, "site-phone")


def _has(page: Path, fragment: str) -> bool:
    return f'id="{fragment}"' in page.read_text(encoding="utf-8")
