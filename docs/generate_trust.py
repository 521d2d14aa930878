"""Write the tables of the Trust page from ``docs/data/trust.json``.

``make fuzz RECORD=docs/data/trust.json`` and ``make kills RECORD=docs/data/trust.json`` make that file.
"""

from typing import Any

from generated import fill, read_data, row, table

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")


def inputs(counts: dict[str, dict[str, int]]) -> str:
    """Return what became of damaged files, by what read them."""
    lines = table("read as", "files", "refused in one line", "taken", "faults")
    names = ("refused", "accepted", "fault")
    readers = {name: each for name, each in counts.items() if name != "commands"}
    for name, each in sorted(readers.items()):
        lines.append(row(name, f"{sum(each.values()):,}", *(f"{each.get(kind, 0):,}" for kind in names)))
    total = {kind: sum(each.get(kind, 0) for each in readers.values()) for kind in names}
    lines.append(row("**all**", f"{sum(total.values()):,}", *(f"{total[kind]:,}" for kind in names)))
    told = counts["commands"]
    wrong = told.get("fault", 0)
    return "\n".join(
        [*lines, "", f"Of {sum(told.values()):,} commands with damaged options {wrong:,} were not told well."]
    )


def kills(commands: dict[str, dict[str, int]]) -> str:
    """Return how often commands were killed, and what was lost."""
    lines = table("command", *SIGNALS, "lost anything")
    for name, each in commands.items():
        lines.append(row(f"`{name}`", *(each.get(number, 0) for number in SIGNALS), each.get("lost", 0)))
    every = sum(each.get(number, 0) for each in commands.values() for number in SIGNALS)
    return "\n".join([f"{every} kills:", "", *lines])


if __name__ == "__main__":
    data: dict[str, Any] = read_data("trust")
    fill("trust.md", inputs=inputs(data["inputs"]["outcomes"]), kills=kills(data["kills"]["commands"]))
