"""vLLM: its defaults and rules by version, the flags of its server, and the names of its metrics."""

from lora_capacity.engines.vllm.config import FlagValue, ServerConfig, flag_words
from lora_capacity.engines.vllm.launch import ENVIRONMENT, FORMS, emitted
from lora_capacity.engines.vllm.versions import VllmBehaviour

__all__ = ["ENVIRONMENT", "FORMS", "FlagValue", "ServerConfig", "VllmBehaviour", "emitted", "flag_words"]
