"""Reads damaged files by the thousand: ``python -m tests.fuzz --inputs 20000``; 1 where one is not told well."""

import argparse
import collections
import contextlib
import random
import sys
import tempfile
from pathlib import Path

from tests.fuzz import commands
from tests.fuzz.trial import record, run


def main() -> None:
    """Read damaged files, then run damaged commands, a tenth as many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="result file of the Trust page to keep the counts in")
    asked = parser.parse_args()
    outcomes = collections.Counter[str]()
    of_readers: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for trial in run(asked.inputs, asked.seed):
        outcomes["fault" if trial.fault else trial.outcome] += 1
        of_readers[trial.reader]["fault" if trial.fault else trial.outcome] += 1
        if trial.fault:
            _tell(f"{trial.reader}, seed {trial.seed}: {trial.fault}")
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        commands.lay_out(Path())
        for _ in range(asked.inputs // 10):
            words = commands.line(rng)
            wrong = commands.fault(commands.run(words))
            of_readers["commands"]["fault" if wrong else "told"] += 1
            outcomes["command told well" if not wrong else "fault"] += 1
            if wrong:
                _tell(f"{words}: {wrong}")
    _tell(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    if asked.record is not None:
        record(asked.record, "inputs", {"seed": asked.seed, "outcomes": of_readers})
    sys.exit(1 if outcomes["fault"] else 0)


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
