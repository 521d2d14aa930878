"""Some hundred damaged files, the same ones every time; ``make fuzz`` reads many thousands."""

import random
from pathlib import Path

import pytest

from tests.fuzz import commands
from tests.fuzz.readers import readers
from tests.fuzz.trial import run

INPUTS = 40
"""Files of each reader: some seconds of all."""


COMMANDS = 60
"""Lines: the twins compile little for each."""


def test_right_files_are_accepted(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name, reader in readers().items():
        folder = tmp_path_factory.mktemp("right")
        for beside, content in (reader.beside | {reader.file: reader.right}).items():
            (folder / beside).parent.mkdir(exist_ok=True)
            (folder / beside).write_bytes(content)
        assert reader.read(folder / reader.file) is not None, name


def test_every_damaged_file_is_taken_or_refused_in_one_line() -> None:
    trials = list(run(INPUTS * len(readers()), seed=1))
    assert [trial for trial in trials if trial.fault] == []
    refused = {trial.reader for trial in trials if trial.outcome == "refused"}
    assert refused >= set(readers()) - {"journal"}  # of which lines that are torn are passed over


def test_every_damaged_command_answers_or_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no-folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    rng = random.Random(0)
    lines = [commands.line(rng) for _ in range(COMMANDS)]
    faults = {" ".join(words): commands.fault(commands.run(words)) for words in lines}
    assert {words: fault for words, fault in faults.items() if fault} == {}
