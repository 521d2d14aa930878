"""What a step asks of one GPU, read off the model's shape: bytes, operations, kernels and messages."""

from collections import Counter
from dataclasses import dataclass

from lora_capacity.errors import InputError
from lora_capacity.memory import Deployment
from lora_capacity.models import ModelShape, split_model, targeted_modules
from lora_capacity.models.shard import KvLayers

_USUAL_CONTEXT_TOKENS = 1024
"""Tokens that a sequence of the usual workload has: layers with a smaller window read only that of it."""

_HEAD_DIM = 128
"""Width of the usual head."""

_FEW_BITS = 6
"""Bits of a stored weight up to which kernels unpack 4-bit numbers; those above are read as they are."""

_RATES = {"fp8": "fp8", "int8": "int8", "nvfp4": "fp4"}
"""Type that a scheme of quantization multiplies in, where the GPU has it; others unpack weights into 16 bits.

Source: kernels that vLLM 0.32 chooses, ``model_executor/layers/quantization/``."""


@dataclass(frozen=True)
class StepWork:
    """Work of an engine step on one of the GPUs that share a model's layers.

    Attributes:
        layers: Decoder layers.
        expert_layers: Those of them that have experts.
        weight_bytes: Weights read in every step, in 8 bits or more, the output head with them.
        packed_bytes: Weights read in every step that are stored in 4 bits or so.
        expert_bytes: One expert of every layer.
        token_flop: Operations of a token's matrix products, two for each multiplication.
        rate: Type of numbers that they are of, as `Processor.flop_per_s` has it.
        kv_bytes: Keys and values of a token of context that attention reads.
        query_heads: Query heads that attend to a token of context, over all layers, in heads of 128 numbers; those of
            latent attention, whose kernels are made for many heads, do not count.
        message_bytes: Bytes that a token adds to the messages between the GPUs; 0 with one GPU.
        messages: All-reduces of a step; 0 with one GPU.
        activation_bytes: Bytes that LoRA kernels move for a token: inputs read, outputs read and written.
        lora_kernels: Kernels that adapters add to a step.
        adapter_tensors: Matrices of an adapter, those of a fused layer whole.
        adapter_bytes: Bytes of an adapter for each unit of its rank.
    """

    layers: int
    expert_layers: int
    weight_bytes: float
    packed_bytes: float
    expert_bytes: float
    token_flop: float
    rate: str
    kv_bytes: float
    query_heads: float
    message_bytes: float
    messages: int
    activation_bytes: float
    lora_kernels: int
    adapter_tensors: int
    adapter_bytes: float

    @classmethod
    def of_model(
        cls,
        model: ModelShape,
        deployment: Deployment | None = None,
        target_modules: str | tuple[str, ...] = "all-linear",
        reserved_modules: str | tuple[str, ...] = "all-linear",
    ) -> "StepWork":
        """Count the work of a model.

        Args:
            model: Layer shapes.
            deployment: How it is laid out on GPUs; None: on one.
            target_modules: Modules that adapters adapt, which tell what is loaded.
            reserved_modules: Modules that slots are reserved for, which tell what kernels run.

        Raises:
            InputError: If it is laid out in stages of a pipeline, the GPUs do not divide it, or no module of it that
                has a kernel is adapted.
        """
        deployment = deployment or Deployment()
        if deployment.pipeline_parallel_size > 1:
            raise InputError(
                "pipeline_parallel_size", deployment.pipeline_parallel_size, "1: step times of pipelines are not known"
            )
        (shard,) = split_model(model, deployment.tensor_parallel_size)
        gpus, element_bytes = deployment.tensor_parallel_size, model.dtype_bytes
        weights = packed = expert = flop = activations = adapter_bytes = 0.0
        kernels = tensors = expert_layers = 0
        modules = [module for block in dict.fromkeys(shard.layers) for module in block.modules if not module.experts]
        targets, reserved = (targeted_modules(modules, names) for names in (target_modules, reserved_modules))
        if not targets:
            allowed = (
                f"of {model.name}: {', '.join(dict.fromkeys(m.name for m in modules if m.adapted))}, or their parts"
            )
            raise InputError("target_modules", target_modules, allowed)
        for block, count in Counter(shard.layers).items():
            weights += count * block.local_vectors(gpus) * element_bytes
            expert_layers += count * any(module.experts for module in block.modules)
            for module in block.modules:
                size = count * module.weight_bytes(gpus, element_bytes)
                inputs, outputs = module.local_input(gpus), sum(module.local_outputs(gpus))
                if module.experts:
                    expert += size / module.experts
                elif 0 < module.bits < _FEW_BITS:
                    packed += size
                else:
                    weights += size
                flop += 2.0 * count * inputs * outputs * (model.experts_per_token if module.experts else 1)
                if module in reserved:
                    # Slices of a packed module share two launches: one shrinks, one expands.
                    kernels += 2 * count
                    activations += count * (inputs + 2 * outputs) * element_bytes
                if module in targets:
                    first, second = module.adapter_elements(gpus, fully_sharded_loras=deployment.fully_sharded_loras)
                    tensors += count * (len(first) + len(second))
                    adapter_bytes += count * (sum(first) + sum(second)) * element_bytes

        def reads(kept: KvLayers) -> float:
            window = min(1.0, kept.window / _USUAL_CONTEXT_TOKENS) if kept.kind == "sliding" else 1.0
            return kept.layers * window

        head_bytes = model.head_row_bytes or model.hidden_size * element_bytes
        shared = gpus > 1
        return cls(
            layers=shard.num_layers,
            expert_layers=expert_layers,
            weight_bytes=weights + model.vocab_size * head_bytes / gpus,
            packed_bytes=packed,
            expert_bytes=expert,
            token_flop=flop,
            rate=_RATES.get(model.quantization, "bfloat16"),
            kv_bytes=sum(reads(each) * each.token_elements for each in shard.kv_layers)
            * deployment.kv_element_bytes(shard),
            query_heads=sum(reads(each) for each in shard.kv_layers if each.kind != "latent")
            * model.num_attention_heads
            / gpus
            * model.head_dim
            / _HEAD_DIM,
            # A ring sends and receives each of the n parts n - 1 times, twice over.
            message_bytes=shared * 2 * shard.num_layers * model.hidden_size * element_bytes * 2 * (gpus - 1) / gpus,
            messages=shared * 2 * shard.num_layers,
            activation_bytes=activations,
            lora_kernels=kernels,
            adapter_tensors=tensors,
            adapter_bytes=adapter_bytes,
        )
