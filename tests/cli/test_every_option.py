"""Every option of every command changes the answer, or is refused: none is taken and then read by nobody.

An option is changed alone against a base of its command. Commands that start servers, train or draw are stopped at the
library's door, and what they hand over is their answer.
"""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import click
import numpy as np
import pytest
from lora_capacity_cli.main import main
from lora_capacity_cli.options import CalibrationChoice
from lora_capacity_profiling.machine import Machine, this_cpu
from pyarrow import csv, parquet

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.search import recommend
from lora_capacity.workload import Workload
from tests.cli.conftest import STEADY, WORKLOAD, Run
from tests.cli.fake_site import write_site
from tests.cli.test_bad_input import RUN, write_runs
from tests.unit.fitting.test_fit import write_profile
from tests.unit.profiling.test_observing import DUMPS

LLAMA, QWEN = "llama-3.1-8b-instruct-h100-64gb", "qwen-2.5-7b-instruct-h100-64gb"
PROFILE = Path(__file__).parents[1] / "data" / "profile-cpu"
MINUTE = WORKLOAD.replace("horizon_s: 3600", "horizon_s: 60").replace("[0.4, 0.2]", "[0.2, 0.1]")
FLEET = MINUTE[MINUTE.index("requests:") :]
FLEET += f"adapters: [{{adapter: a, rank: 8, rate_per_s: 0.1}}]\npools: [{{calibration: {LLAMA}}}]\n"
SPACE = "rates_per_s: {min: 0.1, max: 0.4}\nranks: [8, 16]\n"
EVENT = ("--engine", "event")
SEARCHED = ("w.yaml", "--adapters", "8,16", "--max-loras", "4,8", *STEADY, "--format", "json")
POINT = ("w.yaml", "--adapters", "16", "--max-loras", "8", "--format", "json")
TRIED = ("--model", "tiny", "--calibration", "calibration.json", "--predict-with", "steady", "--format", "json")
RUNNING = ("--url", "http://127.0.0.1:1")
DRAWN = "--space space.yaml --workloads 4 --played 0 -o l.parquet"
SEEN = "--workload recorded.yaml --model tiny --adapters 4 --max-lora-rank 16 --max-num-seqs 16"
SEEN += " --max-num-batched-tokens 2048 --window 50s"
BASES: Mapping[str, tuple[str, ...]] = {
    "optimize": ("optimize", *SEARCHED),
    "place": ("place", "fleet.yaml", "--format", "json"),
    "report": ("report", *SEARCHED),
    "simulate": ("simulate", *POINT),
    "cost": ("cost", *POINT),
    "sweep": ("sweep", *SEARCHED, "-o", "grid.csv"),
    "compare": ("compare", *POINT, "--seeds", "1"),
    "label": ("label", *DRAWN.split(), "--format", "json"),
    "train": ("train", "l.parquet", "-o", "s.json"),
    "rules": ("rules", "--workload", "w.yaml", "--format", "json"),
    "predict": ("predict", "w.yaml", "--format", "json"),
    "validate": ("validate", "runs.csv", "--format", "json"),
    "verify": ("verify", "short.yaml", "--adapters", "2,3", "--max-loras", "2", *TRIED),
    "observe": ("observe", *map(str, DUMPS), *SEEN.split(), "-o", "observed.csv", "--format", "json"),
    "profile": ("profile", "tiny", "-o", "p"),
    "fit": ("fit", "profile", "-o", "c.json", "--format", "json"),
    "memory": ("memory", "--model", "Qwen3-8B", "--gpu", "L40S", "--format", "json"),
    "calibrations": ("calibrations",),
    "calibrations show": ("calibrations", "show", LLAMA),
    "calibrations derive": ("calibrations", "derive", *["--model", "Qwen3-8B", "--gpu", "L40S", "--format", "json"]),
}


@dataclasses.dataclass(frozen=True)
class Given:
    """How an option is tried.

    Attributes:
        value: Its value; None for a flag.
        beside: Further words, of the base too.
        refused: Whether it is refused there, in a sentence that names it.
    """

    value: object = None
    beside: tuple[str, ...] = ()
    refused: bool = False


def given(value: object = None, *beside: str) -> Given:
    return Given(value, beside)


def refused(value: object = None, *beside: str) -> Given:
    return Given(value, beside, refused=True)


SETTINGS: dict[str, Given | list[Given]] = {
    "--max-lora-rank": given(32),
    "--max-num-seqs": given(4),
    "--max-num-batched-tokens": given(512),
    "--gpu-memory-utilization": given(0.8),
    "--max-model-len": given(40_000, "--gpu-memory-utilization", "0.35"),
    "--block-size": given(256),
    "--target-modules": given("attention", "--calibration", "new.json"),
    "--watermark": [given(0.99, "--calibration", "new.json"), refused(0.01)],
    "--max-num-active-seqs": [given(4, "--calibration", "new.json"), refused(4)],
    "--long-prefill-token-threshold": given(32),
}
UNTRAINED = {
    "--max-lora-rank": refused(64),
    "--max-model-len": refused(8192),
    "--block-size": refused(32),
    "--target-modules": refused("attention"),
    "--watermark": refused(0.01),
    "--max-num-active-seqs": refused(4),
    "--long-prefill-token-threshold": refused(32),
}
"""Settings that surrogates are not trained for."""
CACHING = {"--enable-prefix-caching": given(None, "--no-enable-prefix-caching", "--sharing")}
RECORDED: dict[str, Given | list[Given]] = {
    "--trace-format": [refused("azure-llm", "--recorded"), refused("azure-llm")],
    "--time-column": given("at_ms", "--recorded"),
    "--adapter-column": given("tenant", "--recorded"),
    "--input-column": given("prompt", "--recorded"),
    "--output-column": given("answer", "--recorded"),
    "--time-unit": given("s", "--recorded", "--time-column", "at_ms"),
    "--base-model": given("a-0", "--recorded"),
    "--deal": [given("zipf:16", "--recorded"), refused("zipf", "--recorded")],
    "--ranks": [given("16", "--recorded"), refused("many", "--recorded")],
}
ON_L40S = ("--model", "Qwen3-8B", "--gpu", "L40S")
DERIVED: dict[str, Given | list[Given]] = {
    "--model": [given("Qwen3-14B", *ON_L40S), refused("Qwen3-8B", "--calibration", QWEN)],
    "--gpu": [given("RTX 6000 Ada", *ON_L40S), refused("H1000", *ON_L40S)],
    "--tensor-parallel-size": [given(2, *ON_L40S), refused(3, *ON_L40S)],
    "--quantization": given("fp8", *ON_L40S),
    "--kv-cache-dtype": given("fp8", *ON_L40S),
    "--vllm-version": given("0.12.0", *ON_L40S),
    "--specialize-active-lora": [given(None, *ON_L40S), refused()],
}
BOUNDS: dict[str, Given | list[Given]] = {
    "--goodput": [given("ttft:50"), refused("ttft:5", "--goodput", "ttft:6"), refused("itl:5"), refused("ttft=5")],
    "--attainment": [given(1), refused(1.5)],
}
NOWHERE = refused("127.0.0.1:1")
EMITTED = [given("k8s", "--unformatted"), refused("k8s", "--format", "table")]
SEARCH: dict[str, Given | list[Given]] = {
    "--calibration": given(QWEN),
    **DERIVED,
    "--adapters": given("8"),
    "--max-loras": given("4"),
    "--objective": given("fewest-slots"),
    "--within": [given(0.5, "--objective", "fewest-slots"), refused(0.5)],
    **BOUNDS,
    "--starvation-threshold": [given(0.001, "--objective", "throughput"), refused(0.001)],
    "--risk": given(0.2),
    "--engine": given("event"),
    "--seed": [given(7, *EVENT), refused(7)],
    "--seeds": [given(1, *EVENT), refused(3)],
    **SETTINGS,
    **CACHING,
    **{option: refused("s" if option == "--time-unit" else "uniform:8") for option in RECORDED},
    "--ranks": refused("8"),
}
STARTED = {
    "--python": given("other/python"),
    "--flag": given("dtype=float32"),
    "--env": given("A=b"),
    "--port": given(8123),
    "--start-timeout": given(7),
}
CASES: Mapping[str, Mapping[str, Given | list[Given]]] = {
    "optimize": SEARCH | {"--report": given("page.html"), "--emit": EMITTED},
    "place": {**BOUNDS, "--ray": NOWHERE, "--seed": given(7), "--seeds": given(2), "--emit": given("servers")},
    "report": SEARCH
    | {option: given("s" if option == "--time-unit" else "8") for option in RECORDED}
    | {"--deal": given("zipf:8")}
    # What is handed on is not looked at here.
    | {"--goodput": given("ttft:50"), "--attainment": given(1), "--watermark": given(0.01)}
    | {"--max-num-active-seqs": given(4)}
    | {"--output": given("other.html"), "--figures": given("figures")},
    "simulate": {
        "--calibration": given(QWEN),
        **DERIVED,
        **RECORDED,
        **BOUNDS,
        "--adapters": given(12),
        "--max-loras": given(4),
        "--max-cpu-loras": [given(12), refused(4)],
        "--loaded-at-start": given(),
        "--engine": given("event"),
        "--seed": [given(7, *EVENT), refused(7)],
        "--warmup-s": [given(20, *EVENT), refused(20)],
        "--samples": [given(4, *EVENT), refused(4)],
        "--emit": [*EMITTED, refused("config", "--unformatted", "--drain", *EVENT)],
        "--drain": [given(None, *EVENT, "--max-num-seqs", "2"), refused()],
        **SETTINGS,
        **CACHING,
    },
    "cost": {
        "--calibration": given(QWEN),
        **DERIVED,
        **RECORDED,
        "--adapters": given(12),
        "--max-loras": given(4),
        "--max-cpu-loras": [given(12), refused(4)],
        "--loaded-at-start": given(),
        **SETTINGS,
        **CACHING,
    },
    "sweep": {
        "--ray": NOWHERE,
        "--calibration": given(QWEN),
        **DERIVED,
        **BOUNDS,
        "--adapters": given("8"),
        "--max-loras": given("4"),
        "--output": given("grid.parquet"),
        "--engine": given("event"),
        "--seed": [given(7, *EVENT), refused(7)],
        "--seeds": [given(2, *EVENT), refused(2)],
        **SETTINGS,
        **CACHING,
    },
    "compare": {
        "--calibration": given(QWEN),
        **DERIVED,
        "--adapters": given("12"),
        "--max-loras": given("4"),
        "--tolerance": given(0.2),
        "--output": given("grid.csv"),
        "--seed": given(7),
        "--seeds": given(2),
        **SETTINGS,
        **CACHING,
    },
    "label": {
        "--ray": NOWHERE,
        "--calibration": given(QWEN),
        **DERIVED,
        "--space": given("other.yaml"),
        "--workloads": given(5),
        "--played": given(1),
        "--seed": given(7),
        "--output": given("other.parquet"),
    },
    "train": {
        "--calibration": given(QWEN),
        "--seed": given(7),
        "--output": given("other.json"),
        "--smooth": given("smooth.json"),
        "--format": refused("xml"),  # what is trained is not at hand here
    },
    "rules": {
        "--surrogate": given(QWEN),
        "--calibration": refused("none"),
        "--target": given("slots"),
        "--workload": given("other_w.yaml"),
        "--figure": given("tree.svg"),
        **SETTINGS,
        **UNTRAINED,
        "--gpu-memory-utilization": given(0.4, "--target", "starved"),
    },
    "predict": {
        "--surrogate": given(QWEN),
        "--calibration": refused("none"),
        "--kind": given("tree"),
        "--level": given("0.5"),
        "--adapters": given(12, "--adapters", "8", "--max-loras", "4"),
        "--max-loras": given(8, "--adapters", "8", "--max-loras", "4"),
        "--check": given(),
        "--smooth": refused("none.json"),
        **SETTINGS,
        **UNTRAINED,
    },
    "validate": {
        "--ray": [refused("127.0.0.1:1", *EVENT), refused("local")],
        "--calibration": given("other_llama.json"),
        "--engine": given("event"),
        "--seed": [given(7, *EVENT), refused(7)],
        "--seeds": [given(2, *EVENT), refused(2)],
        **{option: refused("x.csv") for option in ("--startup", "--models", "--terms", "--speeds", "--efficiencies")},
        "--leave-out": refused("gpu"),
        "--transfer": given(),
        "--model-config": [refused("Qwen3-8B"), refused("Qwen3-8B", "--transfer")],
        **{option: refused("H100") for option in ("--gpu", "--vllm-version")},
    },
    "verify": {
        **{option: refused("s" if option == "--time-unit" else "uniform:8") for option in RECORDED},
        "--ranks": refused("8"),
        "--adapters": given("2"),
        "--max-loras": given("3"),
        "--calibration": given("other.json"),
        **BOUNDS,
        **{
            option: [given(case.value, *case.beside, "--searched"), refused(case.value)]
            for option, case in {
                "--objective": given("fewest-slots"),
                "--within": given(0.5, "--objective", "fewest-slots"),
                "--starvation-threshold": given(0.001, "--objective", "throughput"),
                "--risk": given(0.2),
                "--engine": given("steady"),
                "--seed": given(7),
                "--seeds": given(1),
            }.items()
        },
        **SETTINGS,
        **CACHING,
        "--max-model-len": given(1024),
        "--target-modules": given("attention"),
        "--watermark": given(0.01),
        "--max-num-active-seqs": given(4),
        "--model": given("other-tiny"),
        "--profile": given(str(PROFILE)),
        **{option: [case, refused(case.value, *RUNNING, "--attached")] for option, case in STARTED.items()},
        "--url": refused("http://127.0.0.1:1"),
        "--neighbours": [given(None, "--searched"), refused()],
        "--seconds": given(60),
        "--warm-up": given(1),
        "--predict-with": given("event"),
        "--traffic-seed": given(7),
        "--tolerance": given(0.3),
        "--itl-tolerance": given(0.3),
        "--folder": [given("elsewhere"), refused("elsewhere", *RUNNING, "--runs", "r.csv", "--attached")],
        "--runs": given("r.csv"),
    },
    "observe": {
        "--workload": given("other_w.yaml"),
        "--model": given("other"),
        "--model-name": refused("nowhere"),
        "--engine-index": refused(7),
        "--gpu": given("H100"),
        "--adapters": given(3),
        "--max-loras": refused(1),
        "--max-lora-rank": given(32),
        "--max-num-seqs": given(8),
        "--max-num-batched-tokens": given(1024),
        "--max-model-len": given(512),
        "--window": given("60s"),
        "--output": given("other.csv"),
        "--startup-log": refused("x.log"),
    },
    "profile": {
        "--output": given("other"),
        "--campaign": given("standard"),
        "--dry-run": given(),
        "--random-model": refused(),
        "--config": given("other-tiny/config.json"),
        "--python": given("other/python"),
        "--flag": given("dtype=float32"),
        "--env": [given("A=b"), refused("A=b", *RUNNING)],
        "--start-timeout": [given(7), refused(7, *RUNNING)],
        "--url": given(RUNNING[1]),
        "--device": refused("gpu"),
        **{
            option: [given(8, *RUNNING), refused(8)] for option in ("--max-loras", "--max-lora-rank", "--max-cpu-loras")
        },
    },
    "fit": {
        "--model": refused("other"),
        "--runs": refused("none.csv"),
        "--name": given("mine"),
        "--output": given("other.json"),
        "--models": refused("none.csv"),
        "--from-nothing": refused(),
        "--source": refused("logs"),
        "--prior": refused(LLAMA),
    },
    "memory": {
        "--model": given("Qwen3-14B"),
        "--gpu": [given("H100"), refused("H1000")],
        "--gpu-memory-gib": given(40),
        "--host-memory-gib": given(40),
        "--vllm-version": given("0.11.0"),
        "--serve-line": given("vllm serve Qwen/Qwen3-8B --max-loras 4 --enable-lora"),
        "--config": refused("none.yaml"),
        "--adapter": refused("none"),
        "--layouts": refused("none.json"),
        "--terms": refused("none.json"),
        "--tensor-parallel-size": [given(2), refused(3)],
        "--pipeline-parallel-size": given(2),
        "--quantization": [given("awq"), refused("gguf")],
        "--kv-cache-dtype": [given("fp8"), refused("fp7")],
        "--max-loras": given(4),
        "--max-cpu-loras": given(64),
        "--max-lora-rank": [given(64), refused(12)],
        "--lora-target-modules": [given("q_proj,v_proj"), refused("x_proj")],
        "--max-num-seqs": given(64),
        "--max-num-batched-tokens": given(8192),
        "--gpu-memory-utilization": given(0.8),
        "--max-model-len": given(4096),
        "--block-size": given(32),
        "--enforce-eager": given(),
        "--fully-sharded-loras": given(None, "--tensor-parallel-size", "2"),
        "--specialize-active-lora": given(None, "--max-loras", "8"),
        "--enable-lora": given(None, "--serve-line", "vllm serve Qwen/Qwen3-8B"),
    },
    "calibrations": {},
    "calibrations show": {},
    "calibrations derive": {
        "--model": given("Qwen3-14B"),
        "--gpu": [given("RTX 6000 Ada"), refused("H1000")],
        "--tensor-parallel-size": [given(2), refused(16)],
        "--quantization": given("fp8"),
        "--kv-cache-dtype": given("fp8"),
        "--vllm-version": given("0.12.0"),
        "--enforce-eager": given(),
        "--fully-sharded-loras": given(None, "--tensor-parallel-size", "2"),
        "--target-modules": [given("attention"), refused("w9")],
        "--efficiencies": refused("none.json"),
        "--name": given("mine"),
        "--output": given("d.json", "--unformatted"),
    },
}
SETTINGS_WITHOUT_WORKLOAD = [("--calibration", QWEN), ("--max-lora-rank", 32), ("--target-modules", "attention")]
UNHEARD: dict[tuple[str, str], str] = {}
"""Options that are known to change nothing yet; each that begins to must go from here."""


def options() -> Iterator[tuple[str, str]]:
    """Yield the name of every command with the name of every option of its own."""
    waiting: list[tuple[tuple[str, ...], click.Command]] = [((), main)]
    while waiting:
        path, command = waiting.pop(0)
        waiting += [((*path, name), each) for name, each in getattr(command, "commands", {}).items()]
        for param in command.params:
            if isinstance(param, click.Option) and path:
                yield " ".join(path), param.opts[-1]


def tried(command: str, option: str) -> list[Given]:
    """Return how an option is tried; what is printed, everywhere in the same way."""
    cases = CASES[command].get(option, [])
    if option == "--format" and not cases:
        return [given("table" if "--format" in BASES[command] else "json")]
    return cases if isinstance(cases, list) else [cases]


EVERY = [
    pytest.param(
        command,
        option,
        case,
        id=f"{command} {option}{' refused' if case.refused else ''}",
        marks=[pytest.mark.xfail(strict=True, reason="changes nothing")] if (command, option) in UNHEARD else [],
    )
    for command, option in options()
    for case in tried(command, option)
]


def test_no_option_is_left_out() -> None:
    assert [(command, option) for command, option in options() if not tried(command, option)] == []
    known = set(options())
    assert [(command, option) for command in CASES for option in CASES[command] if (command, option) not in known] == []


@pytest.mark.parametrize(("command", "option", "case"), EVERY)
def test_an_option_changes_the_answer_or_is_refused(
    site: Path, run: Run, handed: list[Any], command: str, option: str, case: Given
) -> None:
    words = (option,) if case.value is None else (option, str(case.value))
    base = _known(run, handed, _words(command, case.beside))
    found = _answer(run, handed, _words(command, (*case.beside, *words)))
    if case.refused:
        assert found["exit"] == 2, found
        assert option in found["stderr"] or str(case.value) in found["stderr"]
    else:
        assert found["exit"] != 2, found["stderr"]
        assert "Traceback" not in found["stderr"]
        assert found != base


@pytest.mark.parametrize("command", BASES)
def test_the_same_question_has_the_same_answer(site: Path, run: Run, handed: list[Any], command: str) -> None:
    known, again = (ask(run, handed, _words(command, ())) for ask in (_known, _answer))
    assert known["exit"] == 0, known
    assert known == again


@pytest.mark.parametrize(("option", "value"), SETTINGS_WITHOUT_WORKLOAD)
def test_settings_of_no_workload_are_refused(run: Run, option: str, value: object) -> None:
    result = run("rules", option, value)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {option}: ")
    assert "--workload" in result.stderr


def _words(command: str, beside: tuple[str, ...]) -> tuple[str, ...]:
    """Return base and further words; some stand for another base: shared or recorded requests, a search, a server."""
    words = (*BASES[command], *beside)
    for mark, workload in {"--sharing": "sharing.yaml", "--recorded": "requests.csv"}.items():
        if mark in words:
            words = tuple(workload if word == "w.yaml" else word for word in words if word != mark)
    dropped = {"--searched": "--max-loras", "--attached": "--model", "--unformatted": "--format"}
    for mark, option in dropped.items():
        if mark in words:
            at = words.index(option)
            words = tuple(word for word in (*words[:at], *words[at + 2 :]) if word != mark)
    return words


KNOWN: dict[tuple[str, ...], dict[str, Any]] = {}
"""Answers to what was asked before, of which many options are tried beside the same words."""


def _known(run: Run, handed: list[Any], words: tuple[str, ...]) -> dict[str, Any]:
    if words not in KNOWN:
        KNOWN[words] = _answer(run, handed, words)
    return KNOWN[words]


def _answer(run: Run, handed: list[Any], words: tuple[str, ...]) -> dict[str, Any]:
    """Return all that a command says, writes and hands over, but for times, the folder, and the command line."""
    for path in Path().glob("*"):
        if path.suffix in (".html", ".svg", ".csv", ".json", ".parquet") and path.name not in INPUTS:
            path.unlink()
    handed.clear()
    result = run(*words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    written = {path.name: _content(path) for path in sorted(Path().glob("*.*")) if path.name not in INPUTS}
    said = json.dumps([result.stdout, result.stderr, written, _plain(handed)], default=str)
    said = said.replace(str(Path.cwd()), "FOLDER")
    stdout, stderr, written, passed_on = json.loads(re.sub(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", "NOW", said))
    if stdout.startswith("{"):
        stdout = {name: each for name, each in json.loads(stdout).items() if name not in ("seconds", "serve_command")}
    return {
        "exit": result.exit_code,
        "stderr": stderr,
        "stdout": stdout,
        "written": written,
        "handed": passed_on,
    }


def _content(path: Path) -> Any:
    if path.suffix == ".parquet" and path.stat().st_size:
        return parquet.read_table(path).to_pydict()
    return csv.read_csv(path).to_pydict() if path.suffix == ".csv" else path.read_text(encoding="utf-8")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return (
        value if isinstance(value, str | int | float | bool | None) else str(value) if isinstance(value, Path) else ""
    )


NAMED = "w.yaml other_w.yaml space.yaml other.yaml runs.csv short.yaml recorded.yaml calibration.json other.json"
INPUTS = (*NAMED.split(), "sharing.yaml", "requests.csv", "new.json", "other_llama.json")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what the bases name."""
    folder = tmp_path_factory.mktemp("site")
    site = write_site(folder)
    shutil.copytree(site.model, folder / "other-tiny")
    config = json.loads((site.model / "config.json").read_text(encoding="utf-8"))
    (folder / "other-tiny" / "config.json").write_text(json.dumps(config | {"vocab_size": 2 * config["vocab_size"]}))
    (folder / "w.yaml").write_text(MINUTE, encoding="utf-8")
    (folder / "other_w.yaml").write_text(WORKLOAD.replace("mean: 223", "mean: 300"), encoding="utf-8")
    sharing = MINUTE.replace("requests:\n", "requests:\n  shared_prefix_tokens: 64\n")
    (folder / "sharing.yaml").write_text(sharing, encoding="utf-8")
    rows = [f"{i},{2000 * i},a-{i % 20},b-{i % 17},{50 + i},{60 + i},20,30,8" for i in range(100)]
    names = "arrival_s,at_ms,adapter,tenant,input_tokens,prompt,output_tokens,answer,rank"
    (folder / "requests.csv").write_text("\n".join([names, *rows]), encoding="utf-8")
    (folder / "recorded.yaml").write_text(MINUTE, encoding="utf-8")
    (folder / "fleet.yaml").write_text(FLEET, encoding="utf-8")
    (folder / "space.yaml").write_text(SPACE, encoding="utf-8")
    (folder / "other.yaml").write_text(SPACE.replace("0.4", "0.8"), encoding="utf-8")
    (folder / "profile").mkdir()
    write_profile(folder / "profile")
    llama, fake = load_calibration(LLAMA), load_calibration(str(site.calibration))
    changed: dict[str, tuple[Calibration, dict[str, Any]]] = {
        "new.json": (llama, {"vllm_version": "0.32.0"}),
        "other_llama.json": (load_calibration(QWEN), {"model": llama.model.to_json()}),
        "other.json": (fake, {"vllm_version": "0.33.0", "gpu": fake.gpu.to_json() | {"name": "z"}}),
    }
    for name, (known, fields) in changed.items():
        (folder / name).write_text(json.dumps(known.to_json() | fields), encoding="utf-8")
    return folder


@pytest.fixture
def site(files: Path, tmp_path: Path, run: Run) -> Path:
    """The folder that commands run in, with the files of the bases."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    write_runs(RUN | {"duration_s": "60"})
    return tmp_path


class Drawn:
    """Labels that nobody has drawn."""

    optima = SimpleNamespace(max_loras=np.ones(1))
    about: ClassVar[dict[str, Any]] = {"seconds": {}, "plays": {}}

    def __len__(self) -> int:
        return 1

    def write(self, name: str) -> None:
        Path(name).touch()


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What commands hand to what starts servers, trains and draws pages, none of which happens here."""
    calls: list[Any] = []

    def record(name: str, answer: Callable[..., Any]) -> None:
        @functools.wraps(answer)
        def called(*args: Any, **named: Any) -> Any:
            calls.append([name, args, named])
            return answer(*args, **named)

        monkeypatch.setattr(name, called)

    def searched(question: dict[str, Any]) -> Any:
        return Workload.from_file(question["workload"]), *_recommendation(question["calibration"])

    trained = SimpleNamespace(write=lambda name: Path(name).write_text("{}"), about={}, scores={}, importance={})
    trained.calibration = trained.best = ""
    for command in ("report", "verify"):
        record(f"lora_capacity_cli.{command}.recommend", searched)
    for command in ("report", "optimize"):
        record(f"lora_capacity_cli.{command}.write_report", lambda *args: [path / "a.svg" for path in args[6:] if path])
    placed = SimpleNamespace(to_dict=dict, servers=(), warnings=(), gpus=0, seconds=0.0)
    placed.cost_per_hour = placed.gap = placed.moves = None
    placed.standby = placed.unplaced = ()
    placed.lower_bound, placed.lower_bound_kind = 0.0, "exact"
    record("lora_capacity.fleet.place", lambda *args, **named: placed)
    record("lora_capacity.fleet.exported", lambda placement: {})
    record("lora_capacity.surrogate.label", lambda *args, **named: Drawn())
    record("lora_capacity.surrogate.train_surrogate", lambda *args, **named: trained)
    record("lora_capacity.surrogate.train_neural", lambda *args, **named: trained)
    monkeypatch.setattr(
        "lora_capacity.surrogate.Dataset.read", lambda path: SimpleNamespace(about={"calibration": LLAMA})
    )
    monkeypatch.setattr("lora_capacity_cli.train._print", lambda *args: None)
    # The trial first: as its module is loaded, it takes what is replaced below from theirs.
    trial = SimpleNamespace(measure=lambda server, tell: None, site="", table="", warm_up_s=0.0)
    trial.workload = SimpleNamespace(horizon_s=1.0)
    record("lora_capacity_profiling.trial.Trial", lambda *args: trial)
    record("lora_capacity_profiling.deployment.Deployment", lambda **named: "server")
    record("lora_capacity_profiling.machine.look_at", lambda python: Machine("cpu", this_cpu(), "0.32.0"))
    profiler = SimpleNamespace(plans=[], estimate_s=lambda: 0.0, run=lambda: None, folder=SimpleNamespace(finished={}))
    record("lora_capacity_profiling.profiler.Profiler", lambda *args, **named: profiler)
    record("lora_capacity_profiling.runs.append_runs", lambda table, rows: None)
    record("lora_capacity.validation.predict_outcomes", lambda *args, **named: [])
    record("lora_capacity_cli.verify.compare", lambda *args: {"agrees": True})
    monkeypatch.setattr("lora_capacity_cli.verify.print_comparison", lambda document: None)
    return calls


@functools.cache
def _recommendation(calibration: CalibrationChoice) -> tuple[Any, Any]:
    known = calibration.load()
    return known, recommend(Workload.from_file("w.yaml"), known, adapters=(4,), max_loras=(2, 4), engine="steady")
