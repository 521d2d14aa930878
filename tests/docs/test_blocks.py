"""Every code block of the documentation runs, and prints what is shown."""

from pathlib import Path

import pytest

from tests.docs.blocks import make_folder, run_page
from tests.docs.pages import PAGES, REPOSITORY

pytestmark = pytest.mark.docs


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=str(page.relative_to(REPOSITORY))) for page in PAGES if "```" in page.read_text("utf-8")],
)
def test_blocks_run_and_print_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, REPOSITORY, page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    run_page(page, tmp_path)
