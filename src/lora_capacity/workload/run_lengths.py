"""What is known of request lengths where only means were measured."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lora_capacity.schema import Count, Document, NotNegative, Positive
from lora_capacity.workload.lengths import LengthDistribution


@dataclass(frozen=True)
class RunLengths(Document):
    """What the request lengths of the serving runs were, where their table tells only means.

    Attributes:
        output_share: Output tokens produced per output token asked for: models may stop early.
        output_std_tokens: Standard deviation of the output lengths.
        max_output_tokens: Longest output.
        kv_tokens_per_request: Mean tokens that a running request holds in the KV cache.
        max_pending: Unanswered requests that the client could hold.
    """

    output_share: Positive
    output_std_tokens: NotNegative
    max_output_tokens: Count
    kv_tokens_per_request: Positive
    max_pending: Positive

    where: ClassVar[str] = "runs"

    def output_lengths(self, mean_tokens: float) -> LengthDistribution:
        """Law of the output lengths with this mean, spread as wide as these bounds allow at most."""
        part = mean_tokens % 1.0
        least = np.sqrt(part * (1.0 - part))
        most = np.sqrt(max(mean_tokens - 1.0, 0.0) * max(self.max_output_tokens - mean_tokens, 0.0))
        std_tokens = float(np.clip(self.output_std_tokens, least, max(most, least)))
        return LengthDistribution.from_moments(mean_tokens, std_tokens, 1, self.max_output_tokens)
