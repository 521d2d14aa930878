"""What reads files, each with a right one: an input is a right one damaged, and how it is read."""

import dataclasses
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lora_capacity_profiling.campaign import load_campaign
from lora_capacity_profiling.deployment import Profiled
from lora_capacity_profiling.folder import ProfileFolder
from lora_capacity_profiling.observing import read_dumps

from lora_capacity.calibration import Calibration, load_calibration
from lora_capacity.engines.vllm.serve_line import read_serve_config
from lora_capacity.measurements import read_profile, read_runs, read_startups
from lora_capacity.memory import EstimatedTerms
from lora_capacity.models import ModelShape
from lora_capacity.models.adapter import read_adapter
from lora_capacity.models.layouts import registry
from lora_capacity.surrogate import Surrogate, load_surrogate
from lora_capacity.surrogate.documents import digest
from lora_capacity.surrogate.space import Space
from lora_capacity.workload import Workload
from tests.fuzz import damage

REPOSITORY = Path(__file__).parents[2]
PROFILE = REPOSITORY / "tests" / "data" / "profile-cpu"
METRICS = REPOSITORY / "tests" / "unit" / "profiling" / "data"
NAME = "llama-3.1-8b-instruct-h100-64gb"

LENGTHS = {"mean": 223, "std": 248, "min": 4, "max": 1024}
WORKLOAD = {
    "adapters": {"mix": {"rates_per_s": [0.4, 0.05], "ranks": [8, 16]}},
    "base_model": {"rate_per_s": 0.1},
    "requests": {"input_tokens": LENGTHS, "output_tokens": {**LENGTHS, "mean": 197, "std": 207}},
    "arrivals": {"process": "gamma", "cv": 2.0},
    "goodput": {"ttft": 2000, "tpot": 100},
    "attainment": 0.95,
    "horizon_s": 3600,
    "max_pending": 26000,
}
LIST = "adapter,rank,rate_per_s\na,8,1.5\nb,16,0.25\n"
TRACE = "arrival_s,adapter,input_tokens,output_tokens,rank\n0,a,10,20,8\n1.5,b,30,5,16\n2.5,,7,9,\n4,a,12,3,8\n"
LOG = "".join(
    f'{{"time": {i}.5, "model": "m-{i % 3}", "prompt_tokens": {i + 5}, "completion_tokens": {7 * i + 1}}}\n'
    for i in range(9)
)
RATES = "adapter,t_s,rate_per_s,cv\na,0,1.5,1\nb,0,0.25,\na,600,3,0.5\nb,600,0.5,2\na,1200,0,0\n"
HISTOGRAM = "tokens,weight\n5,1\n50,3\n500,0.5\n"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
ADAPTER = {"r": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none", "lora_alpha": 32, "rank_pattern": {"x": 8}}
SERVE = {"model": "Qwen/Qwen3-8B", "max-loras": 8, "max-lora-rank": 16, "max-model-len": "8k", "enforce-eager": True}
SPACE = {"rates_per_s": {"min": 0.1, "max": 0.4}, "ranks": [8, 16], "horizon_s": 3600}
RUNS = (
    "model,max_loras,max_cpu_loras,max_lora_rank,ranks,rates,mean_input_tokens,mean_output_tokens,completed,duration_s,"
    "input_throughput,output_throughput,mean_itl_ms,mean_ttft_ms,status,rate_values,rate_counts\n"
    "llama-3.1-8b-instruct,4,8,16,8 16,0.1 0.2,200,200,1000,3600,60,60,15,40,ok,0.1 0.2,4 4\n"
    "llama-3.1-8b-instruct,4,8,16,8 16,0.1 0.2,,,,,,,,,oom,,\n"
)
STARTUPS = (
    "id,vllm_version,engine,gpu,gpu_memory_gib,model,max_model_len,gpu_memory_utilization,outcome\n"
    "one,0.19.0,V1,H100 80GB,79.19,llama,8192,0.9,ok\n"
)
MODELS = "model_as_written_in_table,config_file\nllama,llama.json\n"


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader and a right input of it.

    Attributes:
        file: Name of the file that is damaged.
        right: Its content, bytes.
        read: Called with the file's path.
        damage: How it is damaged, besides `damage.text`.
        beside: Other files that it needs, by name.
    """

    file: str
    right: bytes
    read: Callable[[Path], Any]
    damage: damage.Damage
    beside: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def make(self, folder: Path, rng: random.Random) -> Path:
        """Write a damaged file into a folder."""
        for name, content in self.beside.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        content = damage.text(self.right, rng) if rng.random() < 0.25 else self.damage(self.right, rng)
        path.write_bytes(content)
        return path


def _json(content: bytes, rng: random.Random) -> bytes:
    return damage.as_json(damage.document(json.loads(content), rng))


def _yaml(content: bytes, rng: random.Random) -> bytes:
    changed = damage.document(yaml.safe_load(content), rng)
    try:
        return yaml.safe_dump(changed).encode(errors="surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return damage.as_json(changed)


def _config(content: bytes, rng: random.Random) -> bytes:
    """Damage the configuration of one of the bundled models."""
    known = [each["config"] for each in _bundled()]
    return damage.as_json(damage.document(rng.choice([json.loads(content), *known]), rng))


@functools.cache
def _bundled() -> Any:
    return json.loads((REPOSITORY / "src/lora_capacity/models/bundled_shapes.json").read_text(encoding="utf-8"))


def _signed(content: bytes, rng: random.Random) -> bytes:
    """Damage a document that has a digest, and sign what comes of it."""
    changed = damage.document({k: v for k, v in json.loads(content).items() if k != "digest"}, rng)
    if isinstance(changed, dict):
        changed["digest"] = digest(changed)
    return damage.as_json(changed)


def _lines(content: bytes, rng: random.Random) -> bytes:
    """Damage some lines of a text of lines."""
    lines = content.splitlines()
    for _ in range(rng.choice((1, 3, 20))):
        place = rng.randrange(len(lines))
        lines[place] = rng.choice((b"", damage.text(lines[place] or b" ", rng), lines[rng.randrange(len(lines))]))
    if rng.random() < 0.5:
        word = rng.choice((b"NaN", b"+Inf", b"-1", b"1e400", b"x"))
        lines = [b" ".join([*line.split()[:-1], word]) if rng.random() < 0.05 else line for line in lines]
    return b"\n".join(lines)


def _dumps(path: Path) -> Any:
    return read_dumps([METRICS / "metrics-0.32.0-0.txt", path], 600.0).measured()


def _workload(path: Path) -> Workload:
    """Read a workload and use what only some answers need."""
    workload = Workload.from_file(path)
    rates, _ = workload.adapters.deal(2)
    assert np.all(np.isfinite(rates))
    assert np.isfinite(workload.input_tokens.mean + workload.output_tokens.mean)
    assert 0.1 <= workload.horizon_s <= 30 * 24 * 3600
    return workload


def _calibration(path: Path) -> Calibration:
    found = Calibration.from_file(path)
    json.dumps(found.to_json(), allow_nan=False)
    found.plan_memory(found.server())
    return found


@functools.cache
def readers() -> dict[str, Reader]:
    """Return the readers by name."""
    tables = {"list.csv": LIST.encode(), "trace.csv": TRACE.encode(), "lengths.csv": HISTOGRAM.encode()}
    listed = yaml.safe_dump(WORKLOAD | {"adapters": {"list": "list.csv"}}).encode()
    traced = yaml.safe_dump({"requests": {"trace": "trace.csv"}, "horizon_s": 60}).encode()
    changing = yaml.safe_dump(WORKLOAD | {"adapters": {"rates": "rates.csv", "ranks": [8, 16]}}).encode()
    logged = yaml.safe_dump({"requests": {"trace": {"file": "trace.jsonl", "format": "access-log", "ranks": [8]}}})
    requests = {"input_tokens": {"histogram": "lengths.csv"}, "output_tokens": LENGTHS}
    counted = yaml.safe_dump(WORKLOAD | {"requests": requests}).encode()
    calibration = json.dumps(load_calibration(NAME).to_json()).encode()
    surrogate = json.dumps(load_surrogate(NAME).to_json()).encode()
    terms = json.dumps(EstimatedTerms.bundled().to_json()).encode()
    profile = {path.name: path.read_bytes() for path in PROFILE.iterdir()}
    campaign = b"server: {max_num_seqs: 64, max_num_batched_tokens: 512}\nrepeats: 2\n"
    campaign += b"decode: {batch_size: [1, 4], output_tokens: 64}\n"
    campaign += (
        b"adapters:\n- {max_loras: 8, max_lora_rank: [8], served_adapters: [1, 8], batch_size: [1], output_tokens: 8}\n"
    )
    layouts = json.dumps({"layouts": [], "parts": {}, "modules": {}}).encode()
    llama = (
        ModelShape.from_config(CONFIG, "llama") if hasattr(ModelShape, "from_config") else load_calibration(NAME).model
    )
    journal = b'{"id": "a", "table": "", "row": {}, "repeats": [1.0], "unit": "ms", "took_s": 1.0, "failure": ""}\n'
    found = {
        "workload": Reader("w.yaml", yaml.safe_dump(WORKLOAD).encode(), _workload, _yaml),
        "workload as JSON": Reader("w.json", json.dumps(WORKLOAD).encode(), _workload, _json),
        "adapter list": Reader(
            "list.csv", LIST.encode(), lambda p: _workload(p.with_name("w.yaml")), damage.table, {"w.yaml": listed}
        ),
        "trace": Reader(
            "trace.csv",
            TRACE.encode(),
            lambda p: _workload(p.with_name("w.yaml")),
            damage.table,
            tables | {"w.yaml": traced},
        ),
        "rates": Reader(
            "rates.csv", RATES.encode(), lambda p: _workload(p.with_name("w.yaml")), damage.table, {"w.yaml": changing}
        ),
        "trace of lines": Reader(
            "trace.jsonl", LOG.encode(), lambda p: _workload(p.with_name("w.yaml")), _lines, {"w.yaml": logged.encode()}
        ),
        "histogram": Reader(
            "lengths.csv",
            HISTOGRAM.encode(),
            lambda p: _workload(p.with_name("w.yaml")),
            damage.table,
            {"w.yaml": counted},
        ),
        "calibration": Reader("c.json", calibration, _calibration, _json),
        "surrogate": Reader("s.json", surrogate, Surrogate.from_file, _signed),
        "terms": Reader("t.json", terms, EstimatedTerms.from_file, _json),
        "runs": Reader("runs.csv", RUNS.encode(), read_runs, damage.table),
        "startups": Reader(
            "starts.csv",
            STARTUPS.encode(),
            lambda p: read_startups(p, p.with_name("models.csv")),
            damage.table,
            {"models.csv": MODELS.encode(), "model_configs/llama.json": json.dumps(CONFIG).encode()},
        ),
        "space": Reader("space.yaml", yaml.safe_dump(SPACE).encode(), lambda p: Space.from_file(p).sample(3, 0), _yaml),
        "config": Reader("config.json", json.dumps(CONFIG).encode(), ModelShape.from_file, _config),
        "adapter": Reader(
            "adapter_config.json", json.dumps(ADAPTER).encode(), lambda p: read_adapter(p, 512, llama), _json
        ),
        "layouts": Reader("layouts.json", layouts, registry, _json),
        "serve config": Reader("serve.yaml", yaml.safe_dump(SERVE).encode(), read_serve_config, _yaml),
        "campaign": Reader("campaign.yaml", campaign, lambda p: load_campaign(str(p)), _yaml),
        "profile.json": Reader(
            "profile.json", profile["profile.json"], lambda p: read_profile(p.parent), _json, profile
        ),
        "profiled": Reader("profile.json", profile["profile.json"], lambda p: Profiled.read(p.parent), _json, profile),
        "journal": Reader("points.jsonl", journal, lambda p: ProfileFolder(p.parent), _json),
        "metrics": Reader("at.txt", (METRICS / "metrics-0.32.0-2.txt").read_bytes(), _dumps, _lines),
    }
    for name in ("adapter_latency", "adapter_loading", "backbone_latency", "kv_capacity"):
        file = f"{name}.csv"
        found[name] = Reader(file, profile[file], lambda p: read_profile(p.parent), damage.table, profile)
    return found
