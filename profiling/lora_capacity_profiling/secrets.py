"""What may be a secret, and records and messages without it."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

SECRET = "(secret)"
"""What stands in a record or a message for a value that may be a secret."""

_NAMES = re.compile("TOKEN(?!S|IZER)|KEY|SECRET|PASS|PWD|CREDENTIAL|AUTH(?!OR)", re.IGNORECASE)
"""In the name of a variable or a flag: its value may be one. Tokens and tokenizers are none."""

_ASSIGNED = re.compile(r"(?P<flag>(?:--[\w-]+=)?(?:--)?)(?P<name>[\w.-]+)=(?P<value>.*)", re.DOTALL)

_USER = re.compile(r"(?<=://)[^/\s@]*@")

Value = TypeVar("Value")


def without_secrets(values: Mapping[str, Value]) -> dict[str, Value | str]:
    """Return variables of an environment, or flags, for a record: values of what may be a secret are left out."""
    return {name: SECRET if _NAMES.search(name) else value for name, value in values.items()}


def without_user(text: str) -> str:
    """Return text in which addresses name no user and no password."""
    return _USER.sub(f"{SECRET}@", text)


def command_without_secrets(words: Sequence[str]) -> list[str]:
    """Return the words of a command in which values of flags and variables that may be secrets are left out.

    Both ``NAME=VALUE``, with or without a flag and ``=`` before it, and ``--name VALUE`` are seen.
    """
    shown: list[str] = []
    for word in words:
        before = shown[-1] if shown else ""
        assigned = _ASSIGNED.fullmatch(word)
        if assigned and _NAMES.search(assigned["name"]):
            shown.append(f"{assigned['flag']}{assigned['name']}={SECRET}")
        elif before.startswith("--") and "=" not in before and _NAMES.search(before) and not word.startswith("--"):
            shown.append(SECRET)
        else:
            shown.append(without_user(word))
    return shown
