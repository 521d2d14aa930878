import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_capacity.costs import LoraKernels
from lora_capacity.costs.kernels import is_small, launched_blocks, mean_rows, slot_grids
from lora_capacity.engines import VllmBehaviour
from lora_capacity.memory import Deployment
from tests.examples import LLAMA_8B

SPECIALIZED = LoraKernels(layers=32.0, expand_tiles=384.0, shrink_slices=7.0, specialized=True)
KERNELS = LoraKernels(layers=32.0, expand_tiles=384.0, shrink_slices=7.0)


def test_the_grid_of_a_llama_is_counted_from_its_layers() -> None:
    """Tiles of 128 outputs: q, k, v padded to the widest (3 · 32), o 32, gate and up 2 · 112, down 32."""
    assert LoraKernels.of_model(LLAMA_8B) == KERNELS


@pytest.mark.parametrize(
    ("tokens", "slots", "rank", "expand", "shrink"),
    [
        (1, 1, 8, 32 * 2 * 384 * 1, 32 * 2 * 7 * 1 * 64 * 1),
        (64, 7, 16, 32 * 8 * 384 * 1, 32 * 8 * 7 * 1 * 64 * 2),
        (65, 7, 16, 32 * 8 * 384 * 2, 32 * 8 * 7 * 1 * 64 * 3),
        (127, 7, 32, 32 * 8 * 384 * 2, 32 * 8 * 7 * 2 * 64 * 4),
        (128, 7, 32, 32 * 8 * 384 * 2, 32 * 8 * 7 * 2 * 8 * 4),
        (129, 7, 40, 32 * 8 * 384 * 3, 32 * 8 * 7 * 3 * 8 * 5),
        (2048, 255, 64, 32 * 256 * 384 * 32, 32 * 256 * 7 * 4 * 8 * 64),
    ],
)
def test_blocks_of_one_step_are_those_counted_by_hand(
    tokens: int, slots: int, rank: int, expand: int, shrink: int
) -> None:
    found = launched_blocks(KERNELS, tokens, slots + 1, rank)
    assert [float(blocks) for blocks in found] == [expand, shrink]


def test_means_over_steps_agree_with_the_mean_of_the_steps() -> None:
    """Tokens even over whole tiles; the mean form takes any number, so whole ones are shifted by half a token."""
    for low, high in [(0, 128), (128, 1024)]:
        tokens = np.arange(low, high) + 0.5
        exact = launched_blocks(KERNELS, tokens, 16, 16)
        mean = launched_blocks(KERNELS, tokens.mean(), 16, 16, small_share=float(low < 128))
        for of_steps, of_mean in zip(exact, mean, strict=True):
            assert float(of_mean) == pytest.approx(float(np.mean(of_steps)), rel=1e-6)


ROWS = 0.04
"""Relative error of the mean rows: what spreads a ceiling is taken as the first term of its series tells."""


@pytest.mark.parametrize(
    ("sequences", "spread", "prompts", "prompt_tokens"),
    [(64, 0, 0, 100), (128, 0, 0.8, 300), (30, 5, 0.2, 800), (110, 10, 0.5, 60), (14, 4, 0.2, 1200), (300, 17, 2, 40)],
)
def test_rows_are_those_of_steps_drawn_at_random(
    sequences: float, spread: float, prompts: float, prompt_tokens: float
) -> None:
    rng = np.random.default_rng(5)
    drawn = np.maximum(np.round(rng.normal(sequences, spread, 40_000)), 1)
    parts = rng.poisson(prompts, drawn.size)
    tokens = drawn + np.ceil(rng.gamma(np.maximum(parts, 1e-9), prompt_tokens) * (parts > 0))
    splits = np.where(tokens < 128, 64, 8)
    found = mean_rows(*(jnp.asarray(float(value)) for value in (sequences, spread**2, prompts, prompt_tokens)))
    assert float(found.expand) == pytest.approx(np.ceil(tokens / 64).mean(), rel=ROWS)
    assert float(found.split_shrink) == pytest.approx((splits * np.ceil(tokens / 32)).mean(), rel=ROWS)
    assert float(found.small_share) == pytest.approx((tokens < 128).mean(), abs=ROWS)


def test_the_share_of_small_steps_weighs_the_two_ways_to_split() -> None:
    small, large, half = (launched_blocks(KERNELS, 100.0, 4, 16, small_share=share)[1] for share in (1.0, 0.0, 0.5))
    assert float(small) == 8 * float(large)
    assert float(half) == (float(small) + float(large)) / 2


def test_arrays_broadcast_and_slopes_in_grids_and_tokens_are_the_tiles() -> None:
    expand, shrink = launched_blocks(KERNELS, jnp.asarray([[1.0], [200.0]]), jnp.asarray([2.0, 4.0, 8.0]), 16)
    assert expand.shape == shrink.shape == (2, 3)
    np.testing.assert_allclose(expand[:, 1] / expand[:, 0], 2.0)
    by_grid = jax.grad(lambda grids: launched_blocks(KERNELS, 256.0, grids, 16, 0.0)[0])(8.0)
    assert float(by_grid) == 32 * 384 * 4.5
    by_token = jax.grad(lambda tokens: launched_blocks(KERNELS, tokens, 8.0, 16, 0.0)[0])(256.0)
    assert float(by_token) == 32 * 8 * 384 / 64


def test_specialized_grids_are_those_that_graphs_are_captured_for() -> None:
    """For 1, 2, 4, … adapters and for all slots and one; a step without adapters launches none."""
    active = np.arange(8.0)
    for slots, expected in {
        1: [0, 1, 2, 2, 2, 2, 2, 2],
        4: [0, 1, 2, 4, 4, 5, 5, 5],
        5: [0, 1, 2, 4, 4, 6, 6, 6],
        64: [0, 1, 2, 4, 4, 8, 8, 8],
    }.items():
        np.testing.assert_array_equal(slot_grids(SPECIALIZED, max_loras=slots, adapters=active), expected)
        np.testing.assert_array_equal(slot_grids(KERNELS, max_loras=slots, adapters=active), slots + 1)
    for kernels in (KERNELS, SPECIALIZED):
        assert float(slot_grids(kernels, max_loras=0, adapters=0.0)) == 0


@pytest.mark.parametrize("mean", [0.2, 1.0, 3.0, 7.0, 20.0, 90.0])
def test_specialized_grids_of_a_mean_are_the_mean_of_a_poisson_number(mean: float) -> None:
    drawn = np.random.default_rng(1).poisson(mean, 20_000)
    exact = float(slot_grids(SPECIALIZED, max_loras=100, adapters=np.minimum(drawn, 100)).mean())
    assert float(slot_grids(SPECIALIZED, max_loras=100, adapters=mean, mean=True)) == pytest.approx(exact, rel=0.1)


def test_kernels_of_a_server_follow_its_flags_and_version() -> None:
    flags = Deployment(tensor_parallel_size=2, specialize_active_lora=True)
    old, new = (
        LoraKernels.of_server(LLAMA_8B, flags, VllmBehaviour.for_version(each)) for each in ("0.15.0", "0.33.0")
    )
    assert (old.specialized, new.specialized) == (False, True)
    # A GPU of two has half of the outputs of q, k, v and gate, up, in tiles of 64; all of o and down, in tiles of 128.
    assert old.expand_tiles == new.expand_tiles == 3 * 32 + 32 + 2 * 112 + 32


def test_a_step_is_small_below_128_tokens() -> None:
    assert is_small(jnp.asarray([0.0, 127.0, 128.0, 129.0])).tolist() == [1.0, 1.0, 0.0, 0.0]
