"""Write the Benchmarks page from what the benchmarks wrote.

``docs/data/steady_benchmark.json`` is of ``benchmarks/steady_twin.py --json``, ``docs/data/load_benchmark.json`` of
``benchmarks/load_generator.py --json``.

``python docs/generate_benchmarks.py``
"""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
BEGIN, BEGIN_LOAD = "<!-- generated: benchmarks -->", "<!-- generated: load -->"
END = "<!-- end generated -->"


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


def load_table(data: dict[str, Any]) -> str:
    """Render what the load generator takes, and how close it sees what the server does."""
    where = data["environment"]
    lines = [
        f"Measured on {where['cores']} cores ({where['machine']}) with Python {where['python']}, commit "
        f"`{where['commit']}`, while others kept the machine busy (load average {where['load_average']:.1f}).",
        "",
        "| requests/s | tokens/s | of a core | µs a token | sent late, median and 99 %, ms "
        "| ITL, client and server, ms | TTFT, client and server, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in data["runs"]:
        pairs = [
            ("lag_median_ms", "lag_p99_ms"),
            ("itl_client_ms", "itl_server_ms"),
            ("ttft_client_ms", "ttft_server_ms"),
        ]
        cells = [f"{run['requests_per_s']:.1f}", f"{run['tokens_per_s']:,.0f}", f"{run['core_share']:.1%}"]
        cells += [f"{run['us_per_token']:.0f}", *(f"{run[one]:.2f}, {run[other]:.2f}" for one, other in pairs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Rewrite the page."""
    page = DOCS / "benchmarks.md"
    text = page.read_text()
    for begin, file, render in (
        (BEGIN, "steady_benchmark.json", table),
        (BEGIN_LOAD, "load_benchmark.json", load_table),
    ):
        before, rest = text.split(begin)
        data = json.loads((DOCS / "data" / file).read_text())
        text = f"{before}{begin}\n{render(data)}\n{END}{rest.split(END, 1)[1]}"
    page.write_text(text)


if __name__ == "__main__":
    main()
