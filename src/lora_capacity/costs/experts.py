"""How many experts of a mixture a step reads."""

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from lora_capacity.models import ModelShape


@struct.dataclass
class ExpertRouting:
    """How a mixture sends tokens to its experts.

    Attributes:
        experts: Experts of a layer.
        experts_per_token: Experts that a token goes to.
    """

    experts: ArrayLike
    experts_per_token: ArrayLike

    @classmethod
    def of_model(cls, model: ModelShape) -> "ExpertRouting | None":
        """Return the routing of a model, None of one without experts."""
        experts = model.num_experts
        return cls(float(experts), float(model.experts_per_token)) if experts else None

    def different_experts(self, tokens: ArrayLike) -> Float[Array, "*shape"]:
        """Expected experts of a layer that a step goes to, ``E · (1 − (1 − k/E)^tokens)``.

        Each token is taken to choose its ``k`` of ``E`` experts evenly and by itself; real routing repeats itself more.

        Args:
            tokens: Tokens in the step, any shape.
        """
        experts = jnp.asarray(self.experts)
        return jnp.asarray(experts * (1.0 - (1.0 - self.experts_per_token / experts) ** jnp.asarray(tokens)))
