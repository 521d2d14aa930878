"""vLLM: its defaults and rules by version, the flags of its server, and the names of its metrics."""

from lora_capacity.engines.vllm.config import FlagValue, ServerConfig, flag_words
from lora_capacity.engines.vllm.launch import FORMS, emitted, environment
from lora_capacity.engines.vllm.versions import VllmBehaviour

__all__ = ["FORMS", "FlagValue", "ServerConfig", "VllmBehaviour", "emitted", "environment", "flag_words"]
