"""Predicted and measured side by side, as `verify` answers."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lora_capacity.units import MS_PER_S
from lora_capacity_cli.output import print_table, print_warnings, say, spoken

if TYPE_CHECKING:
    from lora_capacity_profiling.trial import Measured

    from lora_capacity.calibration import Calibration
    from lora_capacity.engines import ServerConfig
    from lora_capacity.validation import Outcome

_SETTINGS = ("max_cpu_loras", "max_loras", "max_lora_rank", "max_num_seqs", "max_num_batched_tokens")
_KV_TOLERANCE = 0.05
"""Least difference of the KV cache that is worth a warning: half of the tolerance of throughput, to which it leads."""


def compare(
    calibration: "Calibration",
    servers: "list[ServerConfig]",
    predicted: "list[Outcome]",
    measured: "list[Measured]",
    tolerances: tuple[float, float],
) -> dict[str, Any]:
    """Return what was measured beside what was predicted, and whether they agree; of configurations tried so far.

    Args:
        calibration: The calibration.
        servers: The configurations.
        predicted: What was predicted of each.
        measured: What was measured of the first of them.
        tolerances: Largest relative errors of throughput and inter-token latency that agree.
    """
    points = [_point(calibration, *each, tolerances) for each in zip(servers, predicted, measured, strict=False)]
    return {"agrees": bool(points) and all(each["agrees"] for each in points), "points": points}


def _point(
    calibration: "Calibration",
    server: "ServerConfig",
    predicted: "Outcome",
    measured: "Measured",
    tolerances: tuple[float, float],
) -> dict[str, Any]:
    from lora_capacity.validation import Agreement

    agreement = Agreement(predicted, _outcome(measured), *tolerances)
    kv_cache_tokens = int(calibration.plan_memory(server).kv_cache_tokens[0])
    return {
        **{name: getattr(server, name) for name in _SETTINGS},
        "agrees": agreement.agrees,
        "error": agreement.errors,
        "predicted": _row(predicted) | {"kv_cache_tokens": kv_cache_tokens},
        "measured": _row(agreement.measured) | _seen(measured),
        "warnings": [*_differences(calibration, kv_cache_tokens, measured), *measured.warnings],
    }


def _outcome(measured: "Measured") -> "Outcome":
    from lora_capacity.validation import Outcome, offered_tokens_per_s

    if measured.serving is None:
        return Outcome(measured.status)
    result = measured.serving.result
    row = result.summary()
    return Outcome(
        status=measured.status,
        offered_tokens_per_s=offered_tokens_per_s(result.requests, measured.serving.workload.horizon_s),
        throughput_tokens_per_s=row["input_throughput"] + row["output_throughput"],
        itl_s=row["mean_itl_ms"] / MS_PER_S,
        tpot_s=row["mean_tpot_ms"] / MS_PER_S,
        ttft_s=row["mean_ttft_ms"] / MS_PER_S,
        attainment=result.attainment(measured.serving.workload.goodput),
    )


def _row(outcome: "Outcome") -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in (*(entry.name for entry in fields(outcome)), "starved")}


def _seen(measured: "Measured") -> dict[str, Any]:
    """Return what only the real server tells."""
    serving = measured.serving
    if serving is None:
        return {"kv_cache_tokens": None, "vllm_version": None}
    window = serving.window
    return {
        "kv_cache_tokens": window.first.kv_cache_tokens,
        "vllm_version": measured.version,
        "requests": int(serving.result.sent.sum()),
        "completed": int(serving.result.completed.sum()),
        "failed": sum(serving.result.failures.values()),
        "mean_running": float(window.running.mean()),
        "mean_waiting": float(window.waiting.mean()),
    }


def _differences(calibration: "Calibration", kv_cache_tokens: int, measured: "Measured") -> list[str]:
    """Say where the server is another than the one that was predicted."""
    found = []
    if measured.version and measured.version != calibration.vllm_version:
        found.append(f"the server is vLLM {measured.version}, the calibration of {calibration.vllm_version}")
    has = measured.serving.window.first.kv_cache_tokens if measured.serving else kv_cache_tokens
    if abs(has - kv_cache_tokens) > _KV_TOLERANCE * kv_cache_tokens:
        found.append(f"the server's KV cache holds {has:,.0f} tokens, predicted were {kv_cache_tokens:,}")
    return found


def print_comparison(document: dict[str, Any]) -> None:
    """Print predicted and measured, two lines a configuration."""
    sources = {"event": "the event twin (same requests)", "steady": "the steady twin"}
    title = f"{document['model']}, {document['seconds']:g} s each; predictions by {sources[document['engine']]}"
    print_table(title, [row for each in document["points"] for row in _lines(each)])
    for each in document["points"]:
        print_warnings(f"A {each['max_cpu_loras']}, S {each['max_loras']}: {text}" for text in each["warnings"])
    verdict = "Predicted and measured agree" if document["agrees"] else "Predicted and measured do not agree"
    say(
        f"{verdict} (throughput within {document['tolerance']:.0%}, inter-token latency within "
        f"{document['itl_tolerance']:.0%}). The runs are in {document['runs_file']}."
    )


def _lines(each: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for who in ("predicted", "measured"):
        values = each[who]
        rows.append(
            {
                "A, S": f"{each['max_cpu_loras']}, {each['max_loras']}",
                "": who,
                "start": spoken(values["status"]),
                "offered tokens/s": values["offered_tokens_per_s"],
                "throughput": values["throughput_tokens_per_s"],
                "ITL ms": values["itl_s"] * MS_PER_S,
                "TTFT ms": values["ttft_s"] * MS_PER_S,
                "in bounds %": values["attainment"] * 100.0,
                "starved": values["starved"],
                "agrees": each["agrees"] if who == "measured" else "",
            }
        )
    errors = {name: 100.0 * error for name, error in each["error"].items()}
    difference = {"A, S": "", "": "error %", "start": "", "offered tokens/s": None, "throughput": errors["throughput"]}
    latencies = {"ITL ms": errors["itl"], "TTFT ms": errors["ttft"], "in bounds %": None}
    return [*rows, difference | latencies | {"starved": "", "agrees": ""}]
