"""What the scripts that write pages share: parts of a page between marks, tables, figures that others published."""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
DATA = DOCS / "data"
END = "<!-- end generated -->"


def read_data(name: str) -> Any:
    """Return a result file of ``docs/data``."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def write_data(name: str, content: Any) -> None:
    """Write a result file of ``docs/data``."""
    DATA.mkdir(exist_ok=True)
    (DATA / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def fill(page: str, **parts: str) -> None:
    """Rewrite the parts of a page that stand between ``<!-- generated: NAME -->`` and ``<!-- end generated -->``."""
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    for name, content in parts.items():
        begin = f"<!-- generated: {name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content}\n{END}{rest.split(END, 1)[1]}"
    path.write_text(text, encoding="utf-8")


def table(*names: str) -> list[str]:
    """Head of a table."""
    return [row(*names), row(*["---"] * len(names))]


def row(*cells: object) -> str:
    """One line of a table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def folded(title: str, lines: list[str]) -> list[str]:
    """A part of a page that a reader opens."""
    return [f'??? note "{title}"', "", *(f"    {line}" if line else "" for line in lines), ""]


def workload_words(name: str) -> str:
    """Say what the published runs' name of a workload stands for: rates in requests per second, and ranks."""
    if name.startswith("rank_"):  # rank_16_rates_1.6_0.8_0.4
        ranks, _, rates = name.removeprefix("rank_").partition("_rates_")
        return f"{', '.join(rates.split('_'))} requests/s, rank {ranks}"
    rates, _, ranks = name.removeprefix("rate_").partition("_size_")  # rate_0.4-0.05-0.0125_size_8-16-16
    told = list(dict.fromkeys(ranks.split("-")))
    ranks = f"rank {told[0]}" if len(told) == 1 else f"ranks {', '.join(ranks.split('-'))}"
    return f"{', '.join(rates.split('-'))} requests/s, {ranks}"


def sources(*tools: dict[str, Any]) -> list[str]:
    """Say where figures of other tools are from."""
    return [f"*{tool['name']}*: {tool['source']}." for tool in tools]


def span(values: list[float]) -> str:
    """A number, or two as one range."""
    return " to ".join(f"{value:g}" for value in values)


def measured_on(environment: dict[str, Any]) -> str:
    """Say where and when a benchmark ran."""
    device = (
        f", JAX on {len(environment['devices'])} x {environment['device_kind']}" if "devices" in environment else ""
    )
    versions = "".join(f", {name} {version}" for name, version in environment["versions"].items())
    load = environment["load_average"]
    others = "others kept the machine busy" if load > environment["cores"] / 2 else "the machine was quiet"
    busy = f"When it began {others} (load average {load:.1f})."
    return (
        f"Measured on {environment['date']} on {environment['cores']} cores ({environment['processor']}, "
        f"{environment['machine']}){device}, with Python {environment['python']}{versions}, commit "
        f"`{environment['commit']}`. {busy}"
    )
