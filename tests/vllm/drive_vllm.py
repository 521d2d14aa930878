"""Runs vLLM's own scheduler and adapter manager, without a model, on cases given as JSON.

Knows nothing of this project, and runs on an interpreter that has vLLM:
``python drive_vllm.py scheduler|adapters CASES.json TRACES.json``.
"""
# mypy: ignore-errors

import inspect
import json
import sys
import tempfile
from collections import deque
from pathlib import Path

import torch
from vllm import config as vllm_config
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

try:
    from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
except ImportError:
    from vllm.lora.models import LoRALRUCache as AdapterLRUCache
    from vllm.lora.models import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

OLD = vllm_config.ModelConfig.__module__ == "vllm.config"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
MAX_MODEL_LEN = 4096


def model_config(folder):
    (Path(folder) / "config.json").write_text(json.dumps(MODEL))
    options = {"dtype": "float32", "seed": 0, "max_model_len": MAX_MODEL_LEN, "skip_tokenizer_init": True}
    if OLD:
        options |= {"task": "generate", "tokenizer_mode": "auto", "trust_remote_code": False}
    return vllm_config.ModelConfig(model=str(folder), tokenizer=str(folder), **options)


def make_scheduler(model, case):
    scheduling = {key: case[key] for key in ("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold")}
    if not OLD:
        given = {name: case[name] for name in ("watermark", "max_num_active_seqs") if case[name]}
        scheduling |= {"is_encoder_decoder": False} | given
    cache = vllm_config.CacheConfig(block_size=16, enable_prefix_caching=case["prefix_caching"])
    settings = vllm_config.VllmConfig(
        model_config=model,
        cache_config=cache,
        scheduler_config=vllm_config.SchedulerConfig(
            max_model_len=MAX_MODEL_LEN, enable_chunked_prefill=True, **scheduling
        ),
        lora_config=vllm_config.LoRAConfig(max_loras=case["max_loras"], max_cpu_loras=case["max_cpu_loras"]),
        device_config=vllm_config.DeviceConfig("cpu"),
        load_config=vllm_config.LoadConfig(),
    )
    attention = {"block_size": case["block_size"], "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
    if OLD:
        attention["use_mla"] = False
    groups = [KVCacheGroupSpec(["layer"], FullAttentionSpec(**attention))]
    # Given first, older versions refuse any but 16 on a CPU.
    settings.cache_config.block_size = case["block_size"]
    settings.cache_config.num_gpu_blocks = case["num_gpu_blocks"]
    memory = {"tensors": {}} if OLD else {"kv_cache_tensors": []}
    arguments = {
        "vllm_config": settings,
        "kv_cache_config": KVCacheConfig(num_blocks=case["num_gpu_blocks"], kv_cache_groups=groups, **memory),
        "structured_output_manager": StructuredOutputManager(settings),
    }
    if OLD:
        return Scheduler(**arguments)
    # On a CPU vLLM turns it off, whatever is asked for.
    settings.scheduler_config.async_scheduling = case["async_scheduling"]
    return settings.scheduler_config.get_scheduler_cls()(block_size=case["block_size"], **arguments)


def block_hasher(case):
    """Return how newer versions tell what a request's blocks hold; in older ones the cache does by itself."""
    if OLD or not case["prefix_caching"]:
        return {}
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    return {"block_hasher": get_request_block_hasher(case["block_size"], hash_function)}


def own_token(number):
    """A token that occurs in no other request and in no shared prefix."""
    return 100 + number


def make_request(hasher, number, adapter, input_tokens, output_tokens, shared_tokens):
    lora = LoRARequest(str(adapter), adapter + 1, "/nowhere") if adapter >= 0 else None
    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    media = ("multi_modal_inputs", "multi_modal_hashes", "multi_modal_placeholders")
    return Request(
        str(number),
        prompt_token_ids=[1] * shared_tokens + [own_token(number)] * (input_tokens - shared_tokens),
        sampling_params=sampling,
        lora_request=lora,
        arrival_time=0.0,
        **hasher,
        **nothing(Request, "eos_token_id", "pooling_params", *media),
    )


def nothing(call, *names):
    """Give None for those of the arguments that this version has."""
    return dict.fromkeys(inspect.signature(call).parameters.keys() & set(names))


def outputs(scheduler, numbers, sampling):
    ids = [str(number) for number in numbers]
    tokens = [[own_token(number)] if number in sampling else [] for number in numbers]
    index = {name: number for number, name in enumerate(ids)}
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index=index,
        sampled_token_ids=tokens,
        logprobs=None,
        prompt_logprobs_dict={},
        **nothing(ModelRunnerOutput, "spec_token_ids", "pooler_output"),
    )


def play(scheduler, case):
    """Serve the requests of a case, a step a second; a step is scheduled when the one ``depth`` before it has ended."""
    arriving = deque(enumerate(case["requests"]))
    depth = 2 if case["async_scheduling"] else 1
    in_flight, trace, unfinished = deque(), [], 0
    now_s = device_free_s = 0
    requests = {}
    hasher = block_hasher(case)
    while arriving or unfinished:
        while arriving and arriving[0][1][0] <= now_s:
            number, (_, *row) = arriving.popleft()
            requests[number] = make_request(hasher, number, *row)
            scheduler.add_request(requests[number])
            unfinished += 1
        if unfinished:
            before = list(scheduler.running)
            output = scheduler.schedule()
            scheduled = {int(name): tokens for name, tokens in output.num_scheduled_tokens.items()}
            if scheduled:
                preempted = [int(r.request_id) for r in reversed(before) if r.status == RequestStatus.PREEMPTED]
                sampling = {number for number in scheduled if samples(requests[number])}
                device_free_s = max(now_s, device_free_s) + 1
                record = {
                    "scheduled": list(scheduled.items()),
                    "found": [
                        [number, found]
                        for number, tokens in scheduled.items()
                        if requests[number] not in before
                        and (found := requests[number].num_computed_tokens - tokens) > 0
                    ],
                    "preempted": preempted,
                    "running": len(scheduler.running),
                    "waiting": len(scheduler.waiting) + len(getattr(scheduler, "skipped_waiting", ())),
                    "blocks_used": case["num_gpu_blocks"] - 1 - free_blocks(scheduler),
                    "end_s": device_free_s,
                }
                in_flight.append((output, outputs(scheduler, list(scheduled), sampling), record))
                if len(in_flight) < depth:
                    continue
        if not in_flight:
            now_s = max(now_s, arriving[0][1][0])
            continue
        output, tokens, record = in_flight.popleft()
        now_s = record["end_s"]
        finished = [int(item.request_id) for item in engine_outputs(scheduler.update_from_output(output, tokens))]
        unfinished -= len(finished)
        trace.append(record | {"finished": finished})
    return trace


def samples(request):
    """Whether a request just scheduled has all its tokens computed and so gains one."""
    # Under asynchronous scheduling tokens are promised ahead, this one included.
    promised = getattr(request, "num_output_placeholders", 0)
    return request.num_computed_tokens == request.num_tokens + max(promised, 1) - 1


def free_blocks(scheduler):
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def engine_outputs(result):
    items = result.outputs if OLD else [item for part in result.values() for item in part.outputs]
    return [item for item in items if item.finish_reason is not None]


class Adapter:
    scaling_factor = None  # 0.8.5 logs it

    def __init__(self, number):
        self.id = number


class AdapterManager(LRUCacheLoRAModelManager):
    """vLLM's manager of the adapters in memory, on a model without modules to adapt; notes what goes to the GPU."""

    def __init__(self, config):
        self.lora_config = config
        self.lora_index_to_id = [None] * config.max_loras
        self.modules = {}
        self._registered_adapters = AdapterLRUCache(config.max_cpu_loras, self.deactivate_adapter)
        self._active_adapters = AdapterLRUCache(config.max_loras, self._deactivate_adapter)
        self.host_loads = []

    def _add_adapter(self, lora):
        self._registered_adapters[lora.id] = lora

    def activate_adapter(self, lora_id):
        loaded = super().activate_adapter(lora_id)
        if loaded:
            self.host_loads.append(lora_id)
        return loaded


class WorkerManager(LRUCacheWorkerLoRAManager):
    """vLLM's manager of what a step needs, with nothing to read from a disk; notes what it would read."""

    def __init__(self, config):
        self._adapter_manager = AdapterManager(config)
        self.disk_loads = []

    def _load_adapter(self, lora_request):
        self.disk_loads.append(lora_request.lora_int_id)
        return Adapter(lora_request.lora_int_id)


def touch(case):
    """Apply the adapters of each step in the order given; return the loads of each."""
    config = vllm_config.LoRAConfig(max_loras=case["max_loras"], max_cpu_loras=case["max_cpu_loras"])
    manager = WorkerManager(config)
    trace = []
    for adapters in case["steps"]:
        manager.disk_loads, manager._adapter_manager.host_loads = [], []
        manager._apply_adapters([LoRARequest(str(number), number + 1, "/nowhere") for number in adapters])
        loads = {"host_loads": manager._adapter_manager.host_loads, "disk_loads": manager.disk_loads}
        trace.append({key: [number - 1 for number in numbers] for key, numbers in loads.items()})
    return trace


def main():
    what, cases_path, traces_path = sys.argv[1:]
    cases = json.loads(Path(cases_path).read_text())
    if what == "adapters":
        traces = [touch(case) for case in cases]
    else:
        with tempfile.TemporaryDirectory() as folder:
            model = model_config(folder)
            traces = [play(make_scheduler(model, case), case) for case in cases]
    import vllm

    Path(traces_path).write_text(json.dumps({"version": vllm.__version__, "traces": traces}))


if __name__ == "__main__":
    main()
