"""Base models: layouts of architectures, the shapes of layers, and how they are read off a ``config.json``."""

from lora_capacity.models.layouts import TARGET_MODULES, expand_target_modules
from lora_capacity.models.shape import LinearModule, ModelShape

__all__ = ["TARGET_MODULES", "LinearModule", "ModelShape", "expand_target_modules"]
