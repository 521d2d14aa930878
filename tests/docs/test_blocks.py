"""Every code block of the documentation runs, and prints what is shown."""

from pathlib import Path

import pytest

from tests.docs.blocks import make_folder, run_page
from tests.docs.pages import PAGES, REPOSITORY

pytestmark = pytest.mark.docs


WITH_CODE = [page for page in PAGES if "```" in page.read_text("utf-8")]
LONGEST_FIRST = sorted(WITH_CODE, key=lambda page: page.stat().st_size, reverse=True)


@pytest.mark.parametrize("page", LONGEST_FIRST, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_blocks_run_and_print_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, REPOSITORY, page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    run_page(page, tmp_path)
