"""Base models: the shapes of their layers."""

from lora_capacity.models.shape import TARGET_MODULES, LinearModule, ModelShape, expand_target_modules

__all__ = ["TARGET_MODULES", "LinearModule", "ModelShape", "expand_target_modules"]
