"""The page stands alone, is well formed, and shows no text of a file as markup."""

import html
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from lora_capacity.reports import Report
from lora_capacity.reports.quantities import CURVES, LOADED, MAPPED

MAX_BYTES = 2_000_000
VOID = {"meta", "link", "input", "br", "hr"}
XLINK_FREE = re.compile(r"""(?:src|href|action|url)\s*[=(]\s*["']?\s*(?!data:,|#)[^"'#)\s>]+""")


class Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.data = ""
        self.images_without_name = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.references += [given[name] for name in ("src", "href", "action") if given.get(name)]
        self.images_without_name += given.get("role") == "img" and not given.get("aria-label")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script" and data.startswith('{"adapters"'):
            self.data = data


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return report.html(title="<script>alert(1)</script>", note="a & b")


@pytest.fixture(scope="module")
def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    return checker


def test_page_is_well_formed_and_small(page: str, checked: Checker) -> None:
    assert checked.open == []
    assert len(checked.ids) == len(set(checked.ids))
    assert len(page.encode()) < MAX_BYTES


def test_page_refers_to_nothing_outside(page: str, checked: Checker) -> None:
    assert [each for each in checked.references if each != "data:,"] == []
    assert "//" not in re.sub(r"^\s*// .*$", "", page, flags=re.MULTILINE).replace("<!doctype", "")
    assert re.findall(r"url\((?!#)", page) == []
    assert "default-src 'none'" in page


def test_texts_are_escaped(page: str) -> None:
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "a &amp; b" in page


def test_every_drawing_has_a_name(checked: Checker) -> None:
    assert checked.images_without_name == 0


def test_data_tells_every_cell(report: Report, checked: Checker) -> None:
    data = json.loads(checked.data)
    cells = report.grid.verdict.size
    assert len(data["verdicts"]) == cells
    assert [len(each["codes"]) for each in data["metrics"]] == [cells] * len(MAPPED)
    assert [len(each["text"]) for each in data["metrics"]] == [cells] * len(MAPPED)
    assert data["verdicts"][data["best"]].startswith("recommended")
    impossible = report.grid.verdict.ravel() == "impossible"
    assert [verdict == "" for verdict in data["verdicts"]] == impossible.tolist()
    points = {"adapters": len(report.curve.adapters), "load": len(report.load.load)}
    assert len(data["panels"]) == len(CURVES) + len(LOADED)
    for key, panel in data["panels"].items():
        assert {len(each) for each in panel.values()} == {points[key.partition("-")[0]]}


def test_page_tells_the_recommendation_and_its_command(report: Report, page: str) -> None:
    best = report.found.best
    assert f"<h1>Serve <b>{best.max_cpu_loras} adapters</b> with <b>{best.max_loras} slots</b></h1>" in page
    assert report.found.serve_command in page
    assert report.calibration.provenance["source"] in page
    for warning in report.found.warnings:
        assert html.escape(warning) in page


def test_figures_are_documents_of_their_own(report: Report) -> None:
    figures = report.figures()
    groups = {"map": MAPPED, "adapters": CURVES, "load": LOADED}
    drawn = {f"{group}-{each.key}" for group, known in groups.items() for each in known}
    assert set(figures) == drawn | {"bounds", "memory", "service", "changes"}
    for name, document in figures.items():
        root = ElementTree.fromstring(document)
        assert root.tag == "{http://www.w3.org/2000/svg}svg", name
        assert {*re.findall(r"var\((--[\w-]+)\)", document)} <= {*re.findall(r"(--[\w-]+):", document)}, name
        assert {*re.findall(r"url\(#([\w-]+)\)", document)} <= {*re.findall(r'id="([\w-]+)"', document)}, name
