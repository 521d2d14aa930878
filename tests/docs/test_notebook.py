"""The notebook tutorial is its page, cell by cell; the page's blocks are run with those of the others."""

import json
import runpy

import pytest

from tests.docs.pages import REPOSITORY

pytestmark = pytest.mark.docs

MOST_LINES = 15
"""Lines of a step: what a reader takes in at once."""

HOOK = runpy.run_path(str(REPOSITORY / "docs" / "notebooks.py"))
PAGE = REPOSITORY / "docs" / HOOK["PAGE"]


def cells() -> list[str]:
    """The code of each cell."""
    content = json.loads(HOOK["notebook"](PAGE.read_text("utf-8")))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_steps_are_short_and_there_are_the_ones_promised() -> None:
    code = cells()
    assert code
    assert max(len(cell.splitlines()) for cell in code) <= MOST_LINES
    for step in ("results.to_pandas()", "axis.plot(", "jax.jacfwd(", "value_per_s.idxmax()", "lc.recommend("):
        assert any(step in cell for cell in code), step


def test_it_has_the_blocks_of_the_page_and_none_of_what_they_print() -> None:
    page = PAGE.read_text("utf-8")
    assert len(cells()) == page.count("```python\n")
    assert all(cell in page for cell in cells())
    assert "```text" in page
    assert "```text" not in HOOK["notebook"](page)
