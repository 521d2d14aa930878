"""The build of the documentation fails where a link leads nowhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import REPOSITORY

pytestmark = pytest.mark.docs


@pytest.mark.parametrize(
    ("link", "complaint"),
    [
        (None, None),
        ("[gone](gone.md)", "gone.md"),
        ("[gone](cli.md#gone)", "does not contain an anchor '#gone'"),
        ("[gone](/cli.md)", "absolute link"),
    ],
)
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path, link: str | None, complaint: str | None) -> None:
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    for name in ("src", "cli", "profiling", "mkdocs.yml", "README.md"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    page = tmp_path / "docs" / "index.md"
    page.write_text(f"{page.read_text('utf-8')}\n{link or ''}\n", encoding="utf-8")
    recipe = re.search(r"mkdocs (build .*)", (REPOSITORY / "Makefile").read_text("utf-8"))
    assert recipe is not None
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *recipe[1].split()],
        cwd=tmp_path,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == (link is not None), done.stderr
    assert (complaint or "") in done.stderr
