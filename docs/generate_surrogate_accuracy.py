"""Write the page on the surrogates' accuracy from what ``benchmarks/surrogate.py`` wrote into ``docs/data``.

``python docs/generate_surrogate_accuracy.py``
"""

from typing import Any

from generated import fill, measured_on, read_data, row, table

_KINDS = {
    "tree": "one tree, at most 32 leaves",
    "rounded": "the same, rounded",
    "boosting": "boosting",
    "best": "best of each",
}
_DERIVATIVES = ("surrogate", "twin", "median_difference")
_SCORES = ("adapters_smape", "slots_smape", "throughput_smape", "starved_macro_f1")


def held_back(data: dict[str, Any]) -> str:
    """Render scores on held-out labels, and how often intervals hold."""
    lines = table("calibration", "models", "A, SMAPE %", "S, SMAPE %", "throughput, SMAPE %", "starved, macro F")
    for name, scores in data["scores"].items():
        for kind, words in _KINDS.items():
            told = [
                f"{scores[kind][score]:.3f}" if score.endswith("f1") else f"{scores[kind][score]:.2f}"
                for score in _SCORES
            ]
            lines.append(row(f"`{name}`", words, *told))
    levels = list(next(iter(data["scores"].values()))["best"]["coverage"]["adapters"])
    lines += ["", *table("calibration", "intervals of", *(f"{float(level):.0%}" for level in levels))]
    for name, scores in data["scores"].items():
        for target, shares in scores["best"]["coverage"].items():
            lines.append(row(f"`{name}`", target, *(f"{100 * shares[level]:.1f} %" for level in levels)))
    return "\n".join(lines)


def real(data: dict[str, Any]) -> str:
    """Render regret on the real optima."""
    lines = table(
        "model, workload",
        "best measured A, S",
        "predicted A, S",
        "chosen of the grid",
        "regret %",
        "checked by the twin",
        "regret %",
        "within 1 %",
        "interval holds",
    )
    for each in data["optima"]:
        starved = " (starved)" if each["starved"] else ""
        checked_starved = " (starved)" if each["checked_starved"] else ""
        lines.append(
            row(
                f"{each['model']}, {each['scenario'].removeprefix('rate_')}",
                _pair(each["measured"]),
                _pair(each["predicted"]),
                _pair(each["chosen"]) + starved,
                f"{100 * each['regret']:.2f}",
                _pair(each["checked_by_twin"]) + checked_starved,
                f"{100 * each['checked_regret']:.2f}",
                f"{each['within_1_percent']} of {each['configurations']}",
                "yes" if each["interval_holds"] else "no",
            )
        )
    count = len(data["optima"])
    lines += ["", _summary(data["optima"], count)]
    return "\n".join(lines)


def _summary(optima: list[dict[str, Any]], count: int) -> str:
    mean = {
        name: sum(each[name] for each in optima) / count for name in ("smape_adapters", "smape_slots", "verdicts_right")
    }
    worst, checked = (100 * max(each[name] for each in optima) for name in ("regret", "checked_regret"))
    starved = sum(each["starved"] for each in optima)
    checked_starved = sum(each["checked_starved"] for each in optima)
    right, held = 100 * mean["verdicts_right"], sum(each["interval_holds"] for each in optima)
    return (
        f"Regret at most {worst:.2f} %, {starved} of {count} choices starved; with the twin's check at most "
        f"{checked:.2f} %, {checked_starved} starved. By the paper's measure the choices' SMAPE is "
        f"{mean['smape_adapters']:.1f} % on A and {mean['smape_slots']:.1f} % on S. Of the started configurations "
        f"{right:.1f} % are told rightly to starve or not; the interval of A holds the real one for {held} of {count} "
        "workloads."
    )


def gradients(data: dict[str, Any]) -> str:
    """Render derivatives of the differentiable surrogate against the steady twin's."""
    found = data["gradients"]
    lines = table(
        "load, over that sustained",
        *("by requests: surrogate", "twin", "median difference"),
        *("by slots: surrogate", "twin", "median difference"),
    )
    for each in found["at"]:
        told = [f"{each[name][what]:.3f}" for name in ("requests", "slots") for what in _DERIVATIVES]
        lines.append(row(f"{each['load']:g}", *told))
    scores = found["scores"]
    lines += [
        "",
        f"Trained for `{found['calibration']}` in {found['trained_s']:.0f} s; on held-out workloads throughput is off "
        f"by {100 * scores['throughput_log_error']:.1f} % on average, the margin to starvation by "
        f"{100 * scores['margin_log_error']:.1f} %.",
    ]
    return "\n".join(lines)


def times(data: dict[str, Any]) -> str:
    """Render times of predictions and labels."""
    took = data["prediction"]
    lines = [f"Predictions: {measured_on(took['environment'])}", "", f"Labels: {measured_on(data['environment'])}", ""]
    lines += table("adapters, slots and throughput of a workload", "µs", f"µs each, in a batch of {took['batch']:,}")
    lines.append(row(f"{took['trees']} trees as arrays", f"{took['one_us']:.1f}", f"{took['batch_us_each']:.2f}"))
    lines.append(row("the same, processor time", f"{took['one_cpu_us']:.1f}", f"{took['batch_cpu_us_each']:.2f}"))
    lines.append(
        row(
            "as many trees by scikit-learn's `predict`",
            f"{took['scikit_learn_one_us']:,.0f}",
            f"{took['scikit_learn_batch_us_each']:.2f}",
        )
    )
    lines += ["", f"Working out the features of a workload takes {took['features_one_us'] / 1e3:.1f} ms more.", ""]
    lines += table(
        "labels of", "workloads", "steady twin, s", "event twin, s (played)", "choosing, s", "the published pipeline"
    )
    for each in data["labels"]:
        seconds, days = each["seconds"], each["published_pipeline_days"]
        lines.append(
            row(
                f"`{each['calibration']}`",
                f"{each['workloads']:,}",
                f"{seconds['steady_twin']:.0f}",
                f"{seconds['event_twin']:.0f} ({each['played']})",
                f"{seconds['choosing']:.0f}",
                f"{days[0]:.0f} to {days[1]:,.0f} days",
            )
        )
    return "\n".join(lines)


def _pair(values: list[int]) -> str:
    return f"{values[0]}, {values[1]}"


def main() -> None:
    """Rewrite the page."""
    data = read_data("surrogate_benchmark")
    fill("surrogate-accuracy.md", held=held_back(data), real=real(data), gradients=gradients(data), times=times(data))


if __name__ == "__main__":
    main()
