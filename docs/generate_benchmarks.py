"""Write the Benchmarks page from ``docs/data/steady_benchmark.json``, made by ``benchmarks/steady_twin.py --json``.

``python docs/generate_benchmarks.py``
"""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
BEGIN, END = "<!-- generated: benchmarks -->", "<!-- end generated -->"


def table(data: dict[str, Any]) -> str:
    """Render the figures with what they were measured on."""
    where = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"Measured on {where['cores']} cores ({where['machine']}, {where['device_kind']}) with {versions}, "
        f"Python {where['python']}, commit `{where['commit']}`.",
        "",
        "| steady twin | configurations | compiling, s | running, s | configurations/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    calls = [("one device, one call", call) for call in data["one_device"]]
    calls += [("a sweep on every core", data["sweep"]), ("plain Python, crude fixed point", data["baseline"])]
    for name, call in calls:
        compiling = f"{call['compile_s']:.1f}" if call.get("compile_s") else ""
        rate = f"{call['configs_per_s']:,.0f}"
        lines.append(f"| {name} | {call['configs']:,} | {compiling} | {call['run_s']:.4f} | {rate} |")
    lines += ["", "| `optimize` | first, s | again, s | configurations looked at |", "| --- | --- | --- | --- |"]
    for search in data["optimize"]:
        first, again = f"{search['first_s']:.2f}", f"{search['again_s']:.2f}"
        lines.append(f"| `examples/{search['workload']}.yaml` | {first} | {again} | {search['looked_at']:,} |")
    return "\n".join(lines)


def main() -> None:
    """Rewrite the page."""
    page = DOCS / "benchmarks.md"
    before, rest = page.read_text().split(BEGIN)
    data = json.loads((DOCS / "data" / "steady_benchmark.json").read_text())
    page.write_text(f"{before}{BEGIN}\n{table(data)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
