"""Names of the release before are found, and say where they are now."""

import importlib

import pytest

import lora_capacity


@pytest.mark.parametrize("old", sorted(lora_capacity._RENAMED))
def test_old_name_is_found_with_a_warning(old: str) -> None:
    module, _, new = lora_capacity._RENAMED[old].rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"lora_capacity\.{old} will be gone .* use lora_capacity\.{module}"):
        value = getattr(lora_capacity, old)
    assert value is getattr(importlib.import_module(f"lora_capacity.{module}"), new)


def test_old_names_are_not_offered() -> None:
    assert not set(lora_capacity._RENAMED) & {*lora_capacity.__all__, *dir(lora_capacity)}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'settle'"):
        lora_capacity.settle  # noqa: B018


@pytest.mark.parametrize("name", sorted(lora_capacity._GONE))
def test_what_is_gone_says_what_does_the_same(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"no attribute '{name}': use simulate"):
        getattr(lora_capacity, name)
