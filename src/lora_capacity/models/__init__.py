"""Base models: layouts of architectures, the shapes of layers, and how they are read off a ``config.json``."""

from lora_capacity.models.layouts import TARGET_MODULES, expand_target_modules, is_targeted
from lora_capacity.models.modules import LinearModule
from lora_capacity.models.shape import ModelShape
from lora_capacity.models.shard import KvLayers, ModelShard, padded_rows, split_model

__all__ = [
    "TARGET_MODULES",
    "KvLayers",
    "LinearModule",
    "ModelShape",
    "ModelShard",
    "expand_target_modules",
    "is_targeted",
    "padded_rows",
    "split_model",
]
