"""Request lengths of measured runs, of which only means and the KV cache in use are known."""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.special import ndtr

from lora_capacity.workload import LengthDistribution, RunLengths

PAIRS = 8192
"""Pairs of lengths in a sample: its means are then off by about 1 %, and an hour of requests repeats few of them."""

INPUT_STD_TOKENS = 248.0
"""Spread of the prompts of the published runs.

Source: ShareGPT as arXiv 2508.08343 drew from it, as the next."""

_SHORTEST_TOKENS, _LONGEST_INPUT_TOKENS = 4, 1024
"""Bounds of the prompts that the published runs drew from ShareGPT, as its sampler has them."""

_HALVINGS = 12
"""Of the interval of correlations: it is then known to 0.0003, far beyond what a measured KV usage tells."""

HALF_BLOCK_TOKENS = 8.0
"""Tokens of a request's last KV block that are reserved and not yet filled, on average: half of vLLM's default 16."""

Pairs = tuple[NDArray[np.int32], NDArray[np.int32]]


@lru_cache(maxsize=256)
def length_pairs(
    input_mean_tokens: float,
    output_mean_tokens: float,
    lengths: RunLengths,
    input_std_tokens: float = INPUT_STD_TOKENS,
) -> Pairs:
    """Return prompt and answer lengths coupled so that running requests hold as much KV cache as measured.

    A running request holds ``(E[input · output] + E[output²]/2) / E[output]`` tokens and half a block. A Gaussian
    copula couples the two laws; its correlation, from -1 to 0, is what makes this the measured value, or as close to
    it as can be.

    Args:
        input_mean_tokens: Mean prompt length.
        output_mean_tokens: Mean answer length.
        lengths: What else is known of them.
        input_std_tokens: Standard deviation of the prompt lengths.

    Returns:
        Prompts and their answers, int32 ``[PAIRS]`` each; the same at every call.

    Raises:
        InputError: If answers within the bounds cannot have this mean.
    """
    first, second = np.random.default_rng(0).standard_normal((2, PAIRS))
    prompts = _prompts(input_mean_tokens, input_std_tokens)
    answer = _quantiles(lengths.output_lengths(output_mean_tokens), first)
    low, high = -0.999, 0.0
    prompt = answer
    for _ in range(_HALVINGS):
        correlation = (low + high) / 2
        prompt = _quantiles(prompts, correlation * first + np.sqrt(1 - correlation**2) * second)
        held = (prompt * answer + answer**2 / 2).mean() / answer.mean() + HALF_BLOCK_TOKENS
        low, high = (low, correlation) if held > lengths.kv_tokens_per_request else (correlation, high)
    return prompt.astype(np.int32), answer.astype(np.int32)


def _prompts(mean_tokens: float, std_tokens: float) -> LengthDistribution:
    """Return a law of prompts with this mean and, where it can have it, this spread."""
    shortest = min(_SHORTEST_TOKENS, int(mean_tokens))
    longest = max(_LONGEST_INPUT_TOKENS, int(np.ceil(4 * mean_tokens)))
    part = mean_tokens % 1.0
    least, widest = np.sqrt(part * (1.0 - part)), np.sqrt((mean_tokens - shortest) * (longest - mean_tokens))
    return LengthDistribution.from_moments(
        mean_tokens, float(np.clip(std_tokens, least, max(0.9 * widest, least))), shortest, longest
    )


def _quantiles(law: LengthDistribution, normal: Float[np.ndarray, " pairs"]) -> Int[np.ndarray, " pairs"]:
    """Turn normal numbers into lengths of the same rank."""
    place = np.searchsorted(np.cumsum(law.probability), ndtr(normal))
    lengths: NDArray[np.int64] = law.tokens[place.clip(max=law.tokens.size - 1)]
    return lengths
