"""What the server's front end adds to the engine's times before clients see them."""

from flax import struct
from jax.typing import ArrayLike

from lora_capacity.costs.coefficients import Prior, coefficient


@struct.dataclass(kw_only=True)
class FrontEndCosts:
    """Coefficients of the API server's process; scalars, none negative, all 0 where nothing is known of it.

    It is one event loop: requests come in, tokens go out, and metrics are read through it, one thing at a time.
    """

    response_s: ArrayLike = coefficient(
        "A request until its first token, on top of the engine's time: HTTP, tokenizing, two hops between processes.",
        gpu=Prior(3e-3, 0.5),
        cpu=Prior(3e-3, 0.7),
        optional=True,
    )
    adapter_response_s: ArrayLike = coefficient(
        "The first request of each adapter, on top: the front end looks for a tokenizer of the adapter's own, and "
        "remembers that there is none.",
        source="get_lora_tokenizer in transformers_utils/tokenizer.py, vLLM 0.8.5; its prior is the 99 % quantile of "
        "the time to first token of published runs in which one request in 80 was its adapter's first",
        gpu=Prior(0.3, 0.15),
        cpu=Prior(0.3, 0.5),
        optional=True,
    )
    streamed_token_s: ArrayLike = coefficient(
        "Each token handed out: detokenizing, and a chunk of the stream. New requests come last in a step's outputs, "
        "so that a first token waits for those of all others.",
        source="AsyncLLM._run_output_handler in v1/engine/async_llm.py, vLLM 0.8.5",
        gpu=Prior(0.1e-3, 0.5),
        cpu=Prior(0.1e-3, 1.0),
        optional=True,
    )
    adapter_set_s: ArrayLike = coefficient(
        "Each combination of waiting and running adapters that was ever seen, in a reading of the metrics: vLLM keeps "
        "a line of each for ever.",
        source="gauge_lora_info in v1/metrics/loggers.py, vLLM 0.8.5; its prior is what prometheus_client takes for a "
        "line",
        gpu=Prior(9e-6, 0.3),
        cpu=Prior(9e-6, 0.3),
        optional=True,
    )
    adapter_name_s: ArrayLike = coefficient(
        "Each running adapter's name in such a line.",
        source="its prior is what prometheus_client and its compression take for a name of 15 letters",
        gpu=Prior(0.15e-6, 0.3),
        cpu=Prior(0.15e-6, 0.3),
        optional=True,
    )
    metrics_interval_s: ArrayLike = coefficient(
        "Time between two readings of the metrics: told, not fitted; 0 where nobody reads them.", optional=True
    )
