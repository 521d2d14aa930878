"""Every public name is explained where a reader looks for it."""

import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import lora_capacity

API_PAGES = Path(__file__).parents[2] / "docs" / "api"
PUBLIC_NAMES = sorted(set(getattr(lora_capacity, "__all__", [])) - {"__version__"})


def test_names_exist_and_repeat_nowhere() -> None:
    assert PUBLIC_NAMES
    assert [name for name in PUBLIC_NAMES if not hasattr(lora_capacity, name)] == []
    assert len(lora_capacity.__all__) == len(set(lora_capacity.__all__))


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name in PUBLIC_NAMES if not _documented(name, getattr(lora_capacity, name))] == []


def test_every_public_member_has_a_docstring() -> None:
    classes = [value for name in PUBLIC_NAMES if inspect.isclass(value := getattr(lora_capacity, name))]
    missing = [
        f"{cls.__name__}.{name}"
        for cls in classes
        for name, member in vars(cls).items()
        if not name.startswith("_") and _is_written_by_hand(member, cls) and not inspect.getdoc(member)
    ]
    assert missing == []


def test_public_names_are_few() -> None:
    assert len(PUBLIC_NAMES) <= 30


def test_api_pages_hold_the_public_names_once_each() -> None:
    assert sorted(name for name in _on_api_pages() if "." not in name) == PUBLIC_NAMES


def test_api_pages_hold_deeper_names_that_exist_and_are_documented_once_each() -> None:
    deeper = [name for name in _on_api_pages() if "." in name]
    assert len(deeper) == len(set(deeper))
    values = {name: pkgutil.resolve_name(f"lora_capacity.{name}") for name in deeper}
    assert [name for name, value in values.items() if not _documented(value.__name__, value)] == []


def _on_api_pages() -> list[str]:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted(API_PAGES.glob("*.md")))
    return re.findall(r"^::: lora_capacity\.([\w.]+)$", pages, re.MULTILINE)


def _documented(name: str, value: object) -> bool:
    # A dataclass without a docstring gets its signature for one.
    return bool(value.__doc__) and not (inspect.isclass(value) and (value.__doc__ or "").startswith(f"{name}("))


def _is_written_by_hand(member: Any, cls: type) -> bool:
    function = member.fget if isinstance(member, property) else inspect.unwrap(getattr(member, "__func__", member))
    return inspect.isfunction(function) and function.__module__ == cls.__module__
