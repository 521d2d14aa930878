import os
from pathlib import Path

import pytest

from lora_capacity import reading
from lora_capacity.errors import InputError
from lora_capacity.reading import read_mapping

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 9)
)


def load(folder: Path, content: str | bytes, name: str = "w.yaml") -> object:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_mapping(path)


def test_yaml_and_json_hold_the_same(tmp_path: Path) -> None:
    expected = {"a": {"b": [1, 0.5, None, "x"]}}
    assert load(tmp_path, "a: {b: [1, 0.5, null, x]}") == expected
    assert load(tmp_path, '{"a":\n\t{"b": [1, 0.5, null, "x"]}}', "w.JSON") == expected
    assert load(tmp_path, b"\xef\xbb\xbfa: {b: [1, 0.5, null, x]}") == expected


@pytest.mark.parametrize(
    ("text", "number"), [("1e-3", 1e-3), ("5E2", 500.0), ("-1e+2", -100.0), ("1.5e3", 1500.0), (".5e1", 5.0)]
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str, number: float) -> None:
    assert load(tmp_path, f"a: {text}") == {"a": number}


def test_text_that_looks_like_an_exponent_stays_text(tmp_path: Path) -> None:
    assert load(tmp_path, "a: 1e3x\nb: '1e3'") == {"a": "1e3x", "b": "1e3"}


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    assert load(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "'nothing' is not allowed; allowed: a mapping", id="empty"),
        pytest.param("# only a comment\n", "'nothing' is not allowed", id="comment"),
        pytest.param("- a\n- b\n", "'a list' is not allowed; allowed: a mapping", id="list"),
        pytest.param("hello", r"'a single value \(hello\)' is not allowed", id="text"),
        pytest.param("a: 1\nb: 2\na: 3\n", "line 3: 'a' is not allowed; allowed: every key once", id="repeated"),
        pytest.param(
            "a:\n  x: 1\n  x: 1\n", "line 3: 'x' is not allowed; allowed: every key once", id="repeated inside"
        ),
        pytest.param("a: [1, 2\nb: 3\n", "line [23]: .* allowed: valid YAML", id="unclosed"),
        pytest.param("a:\n\t- 1\n", "line 2: .* allowed: valid YAML", id="tab"),
        pytest.param("a: 1\n---\nb: 2\n", "line 2: .* allowed: valid YAML", id="two documents"),
        pytest.param("a: !!python/object:os.system x", "line 1: .* allowed: valid YAML", id="tag"),
        pytest.param("a: *nowhere", "line 1: .* allowed: valid YAML", id="alias"),
        pytest.param("a: &a [*a]", "one within itself.*references", id="itself"),
        pytest.param(BOMB, "more values.*at most 1,000,000", id="bomb"),
        pytest.param("? [a]\n: 1", "line 1: .* allowed: names for keys", id="list as key"),
        pytest.param("a: " + "[" * 5000, "'nested too deeply' is not allowed; allowed: at most 32 levels", id="deep"),
        pytest.param("a: " + "[" * 50 + "]" * 50, "'nested too deeply' is not allowed", id="deep enough to walk"),
        pytest.param("a: " + "9" * 5000, "Exceeds the limit .* allowed: valid YAML", id="digits"),
        pytest.param(b"a: 1\nb: \x00\n", "a NUL character", id="NUL"),
        pytest.param(b"a: 1\nb: \x07\n", "line 2: .* allowed: printable text", id="control character"),
        pytest.param(
            bytes(range(256)),
            "'bytes that are no text' .* a YAML or JSON file, in UTF-8",
            id="binary",
        ),
    ],
)
def test_what_is_no_yaml_mapping_is_told_in_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, content)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "w.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"line 1: 'not JSON \(Expecting value\)' is not allowed; allowed: valid JSON"),
        ("a: 1", r"line 1: 'not JSON \(Expecting value\)' is not allowed; allowed: valid JSON"),
        ('{"a": 1,\n "b": }', "line 2: 'not JSON"),
        ('{"a": 1, "a": 2}', "key a: 'a' is not allowed; allowed: every key once"),
        ("[1]", "'a list' is not allowed; allowed: a mapping"),
        ("null", "'nothing' is not allowed"),
        ("[" * 100_000, "'nested too deeply' is not allowed; allowed: at most 32 levels"),
        ('{"a": NaN}', "'NaN' is not allowed; allowed: finite numbers"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_what_is_no_json_mapping_is_told_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path, content, "w.json")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file not found: .*gone.yaml"):
        read_mapping(tmp_path / "gone.yaml")


@pytest.mark.parametrize("name", [".", "w\0.yaml", "x" * 5000])
def test_what_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="allowed: a YAML or JSON file"):
        read_mapping(tmp_path / name)


@pytest.mark.parametrize("text", ["1:30", "0600", "1_000", "0x10", ".inf", ".nan", "2024-01-01"])
def test_numbers_are_written_in_one_way(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"a: {text}") == {"a": text}


def test_only_ordinary_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(InputError, match="'no ordinary file' is not allowed"):
            read_mapping(path)
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 2**20)
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(InputError, match="'1 MiB' is not allowed; allowed: a YAML or JSON file of at most 1 MiB"):
        read_mapping(tmp_path / "large.yaml")
