"""Write the Benchmarks page, and what the Start page says of time, from what the benchmarks wrote into ``docs/data``.

``python docs/generate_benchmarks.py``
"""

from typing import Any

from generated import fill, measured_on, read_data, row, sources, span, table


def first(data: dict[str, Any]) -> str:
    """Render how long a newcomer waits."""
    lines = [measured_on(data["environment"]), ""]
    lines += table("command of the Start page, in this order", "seconds", "answer")
    lines += [row(f"`{each['command']}`", f"{each['seconds']:.1f}", each["first_line"]) for each in data["steps"]]
    return "\n".join(lines)


def first_in_words(data: dict[str, Any]) -> str:
    """Say on the Start page how long its first command takes."""
    where, (seconds,) = data["environment"], [e["seconds"] for e in data["steps"] if e["command"] == "make recommend"]
    return (
        f"From a fresh clone with nothing installed this took {seconds:.0f} seconds on {where['cores']} cores "
        f"on {where['date']}: [Benchmarks](benchmarks.md#from-a-clone-to-a-recommendation)."
    )


def commands(data: dict[str, Any]) -> str:
    """Render what whole commands take."""
    lines = [measured_on(data["environment"]), ""]
    lines += table("command", "warm, s", "warm, s of CPU", "cold, s", "cold, s of CPU", "most memory, MB")
    for each in data["commands"]:
        cells = [f"{each[kind][name]:.1f}" for kind in ("warm", "cold") for name in ("seconds", "cpu_s")]
        lines.append(row(f"`{each['command']}`", *cells, f"{max(each[k]['memory_mb'] for k in ('warm', 'cold')):,.0f}"))
    return "\n".join(lines)


def steady(data: dict[str, Any]) -> str:
    """Render the figures of the steady twin."""
    lines = [measured_on(data["environment"]), ""]
    lines += table("steady twin", "configurations", "compiling, s", "running, s", "configurations/s")
    calls = [("one device, one call", call) for call in data["one_device"]]
    calls += [("a sweep on every core", data["sweep"]), ("plain Python, crude fixed point", data["baseline"])]
    for name, call in calls:
        compiling = f"{call['compile_s']:.1f}" if call.get("compile_s") else ""
        rate = f"{call['configs_per_s']:,.0f}"
        lines.append(row(name, f"{call['configs']:,}", compiling, f"{call['run_s']:.4f}", rate))
    lines += ["", *table("`optimize`", "first, s", "again, s", "configurations looked at")]
    for search in data["optimize"]:
        name = f"`examples/{search['workload']}.yaml`"
        lines.append(row(name, f"{search['first_s']:.2f}", f"{search['again_s']:.2f}", f"{search['looked_at']:,}"))
    return "\n".join(lines)


def event(data: dict[str, Any]) -> str:
    """Render the figures of the event twin, and how they grow."""
    mix, plain, alone = data["mix"], data["against_reference"], data["alone"]
    lines = [measured_on(data["environment"]), ""]
    lines += table("event twin", "configurations", "seconds served", "seconds a configuration")
    played = f"{mix['ms_per_config'] / 1e3:.3f}"
    lines.append(row("idle to overloaded, all cores", mix["configs"], f"{mix['horizon_s']:,.0f}", played))
    served = f"{plain['horizon_s']:,.0f}"
    lines.append(row("some of them, one core", "", served, f"{plain['twin_s_per_config']:.3f}"))
    lines.append(row("the same in plain Python", "", served, f"{plain['reference_s_per_config']:.3f}"))
    others = [read_data("published")[name] for name in ("twin", "blis")]
    lines += [row(f"{tool['name']}, a run", "", "3,600", span(tool["seconds_per_run"])) for tool in others]
    for source in sources(*others):
        lines += ["", source]
    lines += [
        "",
        f"The first run took {mix['first_s']:.0f} s, compiling and a first time playing included. Without drawing its "
        f"requests a server of an hour takes {alone['core_ms_per_config']['processors']:.0f} ms of a core; the twin in "
        f"JAX, which accelerators run, takes {alone['core_ms_per_config']['jax']:.0f} ms there. A configuration takes "
        f"{alone['memory_mb_per_config']:.1f} MB on average, the largest {alone['largest_mb']:.1f} MB; {mix['cores']} "
        f"are in memory at a time, one for each core. The twin is {plain['times_faster']:,.0f} times as fast as plain "
        f"Python.",
        "",
        on_a_gpu(mix, alone),
        "",
    ]
    lines += table("time grows with", "from, to", "ms a configuration, from, to", "as the power")
    for each in data["growth"]:
        along, took = list(each["ms_per_config"]), list(each["ms_per_config"].values())
        ends = f"{float(along[0]):g}, {float(along[-1]):g}"
        lines.append(row(f"`{each['along']}`", ends, f"{took[0]:.0f}, {took[-1]:.0f}", f"{each['exponent']:.2f}"))
    return "\n".join(lines)


def on_a_gpu(mix: dict[str, float], compiling: dict[str, float]) -> str:
    """Estimate what a GPU would take from the bytes that XLA counts."""
    gpu, turn_bytes = read_data("published")["gpu"], compiling["turn_bytes_per_config"]
    seconds = turn_bytes * mix["turns_per_config"] / gpu["memory_bytes_per_s"]
    return (
        f"No GPU was measured; `python benchmarks/event_twin.py --configs 4096` does it there. An estimate: XLA counts "
        f"{turn_bytes / 1e6:.1f} MB a turn and configuration, whole arrays where one element is read. If all of that "
        f"came from memory, an {gpu['name']} ({gpu['memory_bytes_per_s'] / 1e12:g} TB/s by its data sheet) would take "
        f"{1e3 * seconds:.0f} ms a configuration, {1 / seconds:.0f} of them a second, launches of kernels not counted."
    )


def load(data: dict[str, Any]) -> str:
    """Render what the load generator takes, and how close it sees what the server does."""
    lines = [
        f"{data['adapters']} adapters, a token every {1e3 * data['step_s']:g} ms, {data['duration_s']:g} s a rate. "
        + measured_on(data["environment"]),
        "",
    ]
    pairs = {
        "sent late, median and 99 %, ms": ("lag_median_ms", "lag_p99_ms"),
        "ITL, client and server, ms": ("itl_client_ms", "itl_server_ms"),
        "TTFT, client and server, ms": ("ttft_client_ms", "ttft_server_ms"),
    }
    lines += table("requests/s", "tokens/s", "of a core", "µs a token", *pairs)
    for run in data["runs"]:
        cells = [f"{run['requests_per_s']:.1f}", f"{run['tokens_per_s']:,.0f}", f"{run['core_share']:.1%}"]
        cells += [f"{run['us_per_token']:.0f}", *(f"{run[a]:.2f}, {run[b]:.2f}" for a, b in pairs.values())]
        lines.append(row(*cells))
    return "\n".join(lines)


def real(data: dict[str, Any]) -> str:
    """Render how close the twins come to a real server, what its repeats give, and what was recommended."""
    summary = data["summary"]
    lines = [measured_on(data["environment"]), ""]
    lines += table("off from the server, SMAPE %", "runs", "throughput", "ITL", "TTFT")
    keys = ("throughput_tokens_per_s", "itl_ms", "ttft_ms")
    lines += [row(f"{e['twin']} twin", e["runs"], *(f"{e[key]:.1f}" for key in keys)) for e in summary["errors"]]
    lines += ["", *table("the same requests again", "A", "S", "tokens/s", "ITL, ms", "TTFT, ms")]
    kinds = {"point": "at once", "grid": "some minutes later"}
    for each in summary["repeats"]:
        values = (", ".join(f"{value:,.0f}" for value in each[key]) for key in keys)
        lines.append(row(kinds[each["kind"]], each["adapters"], each["max_loras"], *values))
    lines += ["", *table("of the grid", "A", "S", "tokens/s", "served", "below the best")]

    def pair(name: str, each: dict[str, Any], regret: str) -> str:
        cells = (each["adapters"], each["max_loras"], f"{each['tokens_per_s']:,}", f"{each['served']:.1%}")
        return row(name, *cells, regret)

    if summary["best"] is None:
        lines.append(row("every pair starved", "", "", "", "", ""))
    else:
        lines.append(pair("best measured", summary["best"], ""))
        for each in summary["recommended"]:
            name = f"recommended by the {each['engine']} twin, chance of starving {each['risk']:.0%}"
            lines.append(pair(name, each, f"{each['regret']:.1%}"))
    return "\n".join(lines)


def recommendations(data: dict[str, Any]) -> str:
    """Render whether recommendations hold when they are played anew, and whether more would have held."""
    summary, rows = data["summary"], data["workloads"]
    timid = [each for each in rows if each["adapters"] and each["timid"]]
    lines = [
        measured_on(data["environment"]),
        "",
        f"{summary['answered']} of {summary['workloads']} workloads have an answer. {summary['plays_kept']:.1%} of "
        f"{summary['plays']} plays were kept. On {summary['not_timid']:.0%} of the workloads no configuration with a "
        f"tenth more adapters was kept by all eight plays; on {summary['not_timid_with_margin']:.0%} none was that "
        "also leaves the margin which an answer leaves.",
        "",
        *table("workload", "A", "S", "requests, tokens", "bounds, ms", "asked", "worst play", "plays kept", "TTFT, s"),
    ]
    for each in rows:
        if not each["adapters"]:
            lines.append(row(each["workload"], "none", *[""] * 7))
            continue
        bounds = ", ".join(f"{key} {bound_ms:,.0f}" for key, bound_ms in each["bounds_ms"].items())
        limits = f"{each['max_num_seqs']:,}, {each['max_num_batched_tokens']:,}"
        shares = [f"{each[name]:.1%}" for name in ("asked", "worst_attainment")]
        cells = [each["adapters"], each["max_loras"], limits, bounds, *shares, f"{each['kept']} of 8"]
        lines.append(row(each["workload"], *cells, span([round(each_s, 2) for each_s in each["ttft_s"]])))
    if timid:
        lines += ["", *table("a tenth more adapters was kept", "A / S, requests", "with the margin too")]
        lines += [row(each["workload"], each["timid"], "yes" if each["timid_with_margin"] else "no") for each in timid]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the pages."""
    newcomer = read_data("first_recommendation")
    fill("index.md", time=first_in_words(newcomer))
    fill(
        "benchmarks.md",
        first=first(newcomer),
        commands=commands(read_data("commands_benchmark")),
        steady=steady(read_data("steady_benchmark")),
        event=event(read_data("event_benchmark")),
        load=load(read_data("load_benchmark")),
        recommendations=recommendations(read_data("recommendations")),
        real=real(read_data("real_server")),
    )


if __name__ == "__main__":
    main()
