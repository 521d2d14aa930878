"""Every code block of the documentation runs, and prints what is shown."""

from pathlib import Path

import pytest

from tests.docs.blocks import make_folder, run_page

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
TABLES = {
    "adapters.csv": "adapter,rank,rate_per_s\na,8,0.5\nb,16,0.1\n",
    "requests.csv": "arrival_s,adapter,input_tokens,output_tokens\n0,a,10,20\n1,b,30,40\n2,,50,60\n3,a,70,80\n",
}

pytestmark = pytest.mark.docs


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=str(page.relative_to(REPOSITORY))) for page in PAGES if "```" in page.read_text("utf-8")],
)
def test_blocks_run_and_print_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, REPOSITORY)
    for name, content in TABLES.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    run_page(page, tmp_path)
