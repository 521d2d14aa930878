"""Base models: layouts of architectures, the shapes of layers, and how they are read off a ``config.json``."""

from lora_capacity.models.adapter import AdapterConfig, read_adapter
from lora_capacity.models.bundled import bundled_shapes, find_shape
from lora_capacity.models.layouts import TARGET_MODULES, expand_target_modules, targeted_modules
from lora_capacity.models.modules import LinearModule
from lora_capacity.models.shape import ModelShape
from lora_capacity.models.shard import KvLayers, ModelShard, padded_rows, split_model

__all__ = [
    "TARGET_MODULES",
    "AdapterConfig",
    "KvLayers",
    "LinearModule",
    "ModelShape",
    "ModelShard",
    "bundled_shapes",
    "expand_target_modules",
    "find_shape",
    "padded_rows",
    "read_adapter",
    "split_model",
    "targeted_modules",
]
