"""Puts a page beside itself as a notebook when the documentation is built: its text and its code, to be run."""

import re
from pathlib import Path

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGE = "tutorials/python-and-jax.md"
_OUTPUT = re.compile(r"^```text\n.*?^```\n\n?", re.MULTILINE | re.DOTALL)
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(page: str) -> str:
    """Return a page as a notebook: a cell for each block of code, without what it prints, which running it shows."""
    found = jupytext.reads(_OUTPUT.sub("", page), fmt="md")
    found.metadata = {"kernelspec": _KERNEL}
    for place, cell in enumerate(found.cells):
        cell["id"] = f"cell-{place}"  # not a random one: equal pages give equal files
    written: str = jupytext.writes(found, fmt="ipynb")
    return written


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebook to the files of the site; mkdocs calls it by this name."""
    page = (Path(config.docs_dir) / PAGE).read_text(encoding="utf-8")
    files.append(File.generated(config, PAGE.replace(".md", ".ipynb"), content=notebook(page)))
    return files
