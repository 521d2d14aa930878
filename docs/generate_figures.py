"""Draws the figures of *How it works* from the twin itself: ``python docs/generate_figures.py`` writes them anew."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lora_capacity import Workload, build_scenarios, load_calibration, simulate
from lora_capacity.costs import step_time_s
from lora_capacity.engines import ServerConfig
from lora_capacity.reports import svg
from lora_capacity.reports.figures import stand_alone
from lora_capacity.units import MS_PER_S

FOLDER = Path(__file__).parent / "assets" / "figures"
CALIBRATION = load_calibration("llama-3.1-8b-instruct-h100-64gb")
WIDTH, HEIGHT = 590.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 156.0, 30.0, 44.0
LENGTHS = {
    "input_tokens": {"mean": 220, "std": 250, "min": 4, "max": 1024},
    "output_tokens": {"mean": 200, "std": 210, "min": 4, "max": 1024},
}
Series = dict[str, Sequence[float]]
Size = tuple[float, float]


def workload(*rates_per_s: float) -> Workload:
    """Return a workload of adapters of rank 16 at these rates."""
    mix = {"rates_per_s": list(rates_per_s), "ranks": [16]}
    return Workload.from_mapping({"adapters": {"mix": mix}, "requests": LENGTHS, "max_pending": 26000})


def chart(
    name: str, title: str, across: str, xs: Sequence[float], series: Series, *, log: bool = False, log_up: bool = False
) -> str:
    """Return lines over a common axis, each with its name at its end."""
    every = np.concatenate([np.asarray(values, float) for values in series.values()])
    scale = svg.Scale(float(xs[0]), float(xs[-1]), LEFT, WIDTH - RIGHT, log=log)
    low = 0.9 * float(np.nanmin(every)) if log_up else 0.0
    up = svg.Scale(low, 1.06 * float(np.nanmax(every)), HEIGHT - BOTTOM, TOP, log=log_up)
    parts = [svg.axis_y(up, LEFT, 5, WIDTH - RIGHT), svg.axis_x(scale, HEIGHT - BOTTOM, across, 6)]
    parts.append(svg.text(title, 0.0, 13.0, class_="axis strong"))
    ends = []
    for place, (label, values) in enumerate(series.items()):
        known = [(scale(x), up(y)) for x, y in zip(xs, values, strict=True) if np.isfinite(y)]
        parts.append(
            svg.line(known, class_="curve", style=f"stroke:var(--c{28 - 17 * place // max(len(series) - 1, 1)})")
        )
        ends.append((known[-1], label))
    above: svg.Point = (0.0, float("inf"))
    for (x, y), label in sorted(ends, key=lambda end: -end[0][1]):
        # Names of lines that end close to each other stand one above the other.
        above = (x, min(y + 4.0, above[1] - 14.0) if abs(x - above[0]) < 90.0 else y + 4.0)
        # A line that ends inside has its name below it, on the left, where no other line goes.
        inside = x < WIDTH - RIGHT - 1.0
        anchor = {"text_anchor": "end"} if inside else {}
        parts.append(svg.text(label, x - 16.0 if inside else x + 7.0, above[1], class_="row", **anchor))
    return svg.drawing(WIDTH, HEIGHT, name, f"{title} against {across}", *parts)


def step_time() -> str:
    """Step time against the batch, without adapters and with few and many slots."""
    batch = np.arange(1, 257, 3, dtype=float)
    lengths = workload(1.0)
    per_sequence = 1.0 + lengths.mean_input_tokens / lengths.mean_output_tokens

    def ms(slots: float, adapters: float) -> list[float]:
        step_s = step_time_s(
            CALIBRATION.costs,
            tokens=batch * per_sequence,
            prefill_tokens=batch * (per_sequence - 1.0),
            kv_tokens=batch * 350.0,
            adapters=np.minimum(adapters, batch),
            skipped=0.0 * batch,
            queued=0.0 * batch,
            loaded=adapters + 0.0 * batch,
            max_loras=slots + 0.0 * batch,
            max_lora_rank=16.0 + 0.0 * batch,
            small_share=np.where(batch * per_sequence < 128.0, 1.0, 0.0),
        )
        return (np.asarray(step_s) * MS_PER_S).tolist()

    series = {
        f"{slots} slots, {used} in use": ms(slots, used) for slots, used in ((8, 8), (32, 8), (128, 8), (128, 100))
    }
    return chart("Time of a step", "time of a step, ms", "requests in the batch", batch.tolist(), series)


def memory() -> str:
    """KV cache left against slots, by rank."""
    slots = list(range(1, 257, 3))

    def tokens(rank: int) -> list[float]:
        left = []
        for count in slots:
            given = {"max_loras": count, "max_cpu_loras": count, "max_lora_rank": rank}
            server = ServerConfig.with_defaults(CALIBRATION.behaviour, CALIBRATION.gpu, CALIBRATION.model, **given)
            plan = CALIBRATION.plan_memory(server)
            started = plan.headroom_no_kv_cache_bytes[0] >= 0 and plan.headroom_oom_bytes[0] >= 0
            left.append(float(plan.kv_cache_tokens[0]) / 1000.0 if started else float("nan"))
        return left

    series = {f"rank {rank}": tokens(rank) for rank in (8, 16, 32, 64)}
    return chart("Memory left for the KV cache", "KV cache, thousand tokens", "slots S", slots, series)


def slots() -> str:
    """Time to first token against slots, for a few busy and many idle adapters."""
    counts = np.unique(np.rint(np.geomspace(1, 96, 50))).astype(int)

    def served(adapters: int, *rates_per_s: float) -> list[float]:
        asked = workload(*rates_per_s)
        scenarios = build_scenarios(asked, CALIBRATION, adapters=adapters, max_loras=np.minimum(counts, adapters))
        results = simulate(CALIBRATION, scenarios, asked)
        return np.where(counts <= adapters, results.ttft_s, np.nan).tolist()

    series = {
        "24 busy adapters": served(24, 0.75),
        "96 of mixed rates": served(96, 0.5, 0.05, 0.0125),
        "96 idle adapters": served(96, 0.06),
    }
    return chart("Slots", "mean time to first token, s", "slots S", counts.tolist(), series, log=True, log_up=True)


def batch() -> str:
    """Requests in the batch against load: Little's law and its bound."""
    loads = np.linspace(2.0, 40.0, 60)
    asked = workload(1.0)

    def running(seqs: int) -> list[float]:
        one = build_scenarios(asked, CALIBRATION, adapters=[16] * loads.size, max_loras=16, max_num_seqs=seqs)
        given = dataclasses.replace(
            one, class_rate_per_s=(loads[:, None] / 16.0 + 0.0 * one.class_rate_per_s).astype("float32")
        )
        return simulate(CALIBRATION, given, asked).mean_running.tolist()

    series = {f"max_num_seqs {seqs}": running(seqs) for seqs in (64, 128, 256)}
    return chart("The batch", "requests in the batch, mean", "requests per second", loads.tolist(), series)


def boxes(labels: Sequence[str], fills: Sequence[str], x: float, y: float, pitch: float, size: Size) -> list[str]:
    """Return labelled boxes in a row, each in the named colour."""
    width, height = size
    parts = []
    for i, (label, fill) in enumerate(zip(labels, fills, strict=True)):
        left = x + i * pitch
        style = f"fill:var(--b-{fill})"
        parts.append(svg.element("rect", x=left, y=y, width=width, height=height, rx=4, style=style))
        parts.append(svg.text(label, left + width / 2, y + height / 2 + 5.0, text_anchor="middle"))
    return parts


def queue() -> str:
    """The order of admission: a drawing of one step's pass over the queue."""
    waiting, in_use = "ABACDBA", "AD"
    admitted = [name in in_use for name in waiting]
    pitch, size, y = 54.0, (44.0, 34.0), 110.0
    parts = [
        svg.text("slots (2): adapters in use", 20.0, 20.0, class_="axis strong"),
        *boxes(in_use, ["slots"] * len(in_use), 20.0, 30.0, pitch, size),
        svg.text("waiting, the oldest first", 20.0, 92.0, class_="axis strong"),
        *boxes(waiting, ["none" if each else "dead" for each in admitted], 20.0, y, pitch, size),
    ]
    for i, each in enumerate(admitted):
        words, x = "admitted" if each else "skipped", 42.0 + i * pitch
        parts.append(svg.text(words, x, y + 52.0, class_="num", text_anchor="middle"))
    note = "B and C keep their places and are looked at again in the next step."
    parts.append(svg.text(note, 20.0, 196.0, class_="note"))
    about = "Requests for adapters in use are admitted in order; those for others are skipped and keep their places"
    return svg.drawing(410.0, 210.0, "A pass over the queue", about, *parts)


def tiers() -> str:
    """Where adapters are, and what it takes to bring one up: a drawing with the calibration's times of rank 16."""
    loads = CALIBRATION.costs.loads
    disk_ms = MS_PER_S * (float(loads.disk_s) + 16.0 * float(loads.disk_rank_s))
    rows = (
        ("on the GPU: max_loras slots", "AD", "slots", f"{MS_PER_S * float(loads.host_to_gpu_load_s):.0f} ms"),
        ("in host memory: max_cpu_loras adapters", "ABCD", "sequences", f"{disk_ms:.0f} ms"),
        ("on disk: every adapter", "ABCDEFG", "dead", ""),
    )
    height, parts = 92.0, []
    for i, (name, adapters, fill, load) in enumerate(rows):
        y = 28.0 + i * height
        parts.append(svg.text(name, 16.0, y - 8.0, class_="axis strong"))
        parts += boxes(adapters, [fill] * len(adapters), 16.0, y, 48.0, (40.0, 30.0))
        if load:
            at, top, foot = 376.0, y + 38.0, y + height - 14.0
            parts.append(svg.line([(at, foot), (at, top), (at - 4.0, top + 7.0)], class_="curve"))
            parts.append(svg.line([(at, top), (at + 4.0, top + 7.0)], class_="curve"))
            parts.append(svg.text(f"{load} to load", at + 12.0, (top + foot) / 2 + 4.0, class_="row"))
    parts.append(svg.text("Loads block the engine.", 16.0, 268.0, class_="note"))
    about = "Slots on the GPU hold some of the adapters in host memory, and that some of those on disk; loads take time"
    return svg.drawing(490.0, 280.0, "Tiers", about, *parts)


def preemption() -> str:
    """What happens when a running request finds no KV block: a drawing of the cache in three steps."""
    rows = (
        ("A needs one more block, and none is free", "AAABBCCC"),
        ("C, admitted last, loses its blocks and waits in front", "AAAABB  "),
        ("B is done: C is admitted again, all it had is computed anew", "AAAACCC "),
    )
    fills = {"A": "slots", "B": "sequences", "C": "none", " ": "dead"}
    parts = []
    for i, (name, owners) in enumerate(rows):
        y = 28.0 + i * 76.0
        labels = [owner.strip() or "free" for owner in owners]
        parts.append(svg.text(name, 16.0, y - 8.0, class_="axis strong"))
        parts += boxes(labels, [fills[owner] for owner in owners], 16.0, y, 46.0, (40.0, 30.0))
    parts.append(svg.text("Blocks of the KV cache, by the request that holds them.", 16.0, 236.0, class_="note"))
    about = "A running request that finds no block takes those of the one admitted last, which is computed anew later"
    return svg.drawing(420.0, 248.0, "Preemption", about, *parts)


def interval() -> str:
    """How a queue grows: time to first token against the time looked at, under overload."""
    hours = np.geomspace(60.0, 7200.0, 40)
    asked = workload(1.0)

    def wait(adapters: int) -> list[float]:
        one = build_scenarios(asked, CALIBRATION, adapters=[adapters] * hours.size, max_loras=adapters)
        given = dataclasses.replace(one, horizon_s=np.asarray(hours, "float32"))
        return simulate(CALIBRATION, given, asked).ttft_s.tolist()

    series = {f"{adapters} requests/s": wait(adapters) for adapters in (24, 28, 32)}
    return chart("Transients", "mean time to first token, s", "time looked at, s", hours.tolist(), series, log=True)


def python_sweep() -> str:
    """The sweep of the notebook: throughput over adapters, a line for each number of slots."""
    asked = workload(0.12, 0.06, 0.03)
    adapters, slots = range(12, 301, 12), (8, 16, 32, 64, 128)

    def served(count: int) -> list[float]:
        columns = build_scenarios(asked, CALIBRATION, adapters=adapters, max_loras=count)
        told = simulate(CALIBRATION, columns, asked)
        return np.where(np.array(adapters) < count, np.nan, told.throughput_tokens_per_s).tolist()

    series = {f"{count} slots": served(count) for count in slots}
    return chart("Sweep", "throughput, tokens/s", "adapters", adapters, series)


FIGURES: dict[str, Callable[[], str]] = {
    "step-time": step_time,
    "memory": memory,
    "slots": slots,
    "batch": batch,
    "queue": queue,
    "tiers": tiers,
    "preemption": preemption,
    "python-sweep": python_sweep,
    "transients": interval,
}


def main() -> None:
    """Write every figure."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(stand_alone(draw(), dark=True), encoding="utf-8")


if __name__ == "__main__":
    main()
