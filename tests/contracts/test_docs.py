"""What the documentation shows works as shown."""

import re
from pathlib import Path

import pytest
import yaml

from lora_capacity.workload import Workload

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
TABLES = {
    "adapters.csv": "adapter,rank,rate_per_s\na,8,0.5\nb,16,0.1\n",
    "requests.csv": "arrival_s,adapter,input_tokens,output_tokens\n0,a,10,20\n1,b,30,40\n2,,50,60\n3,a,70,80\n",
}


def _pages_with(language: str) -> list[object]:
    found = [
        (page, re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
        for page in PAGES
    ]
    return [pytest.param(blocks, id=str(page.relative_to(REPOSITORY))) for page, blocks in found if blocks]


@pytest.mark.parametrize("blocks", _pages_with("python"))
def test_python_runs(blocks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("blocks", _pages_with("yaml"))
def test_workloads_are_read(blocks: list[str], tmp_path: Path) -> None:
    for name, text in TABLES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for block in blocks:
        assert Workload.from_mapping(yaml.safe_load(block), tmp_path).horizon_s > 0
