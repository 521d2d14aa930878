import numpy as np
import pytest
import yaml

from lora_capacity.errors import InputError
from lora_capacity.surrogate import Space
from lora_capacity.units import BYTES_PER_GIB


def test_a_space_survives_its_file(tmp_path):
    space = Space(ranks=(16,), rates_per_s=(0.1, 0.4), max_pending=None)
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(space.to_json()), encoding="utf-8")
    assert Space.from_file(path) == space
    path.write_text("rates_per_s: {min: 0.1, max: 0.4}\n", encoding="utf-8")
    assert Space.from_file(path) == Space(rates_per_s=(0.1, 0.4))


def test_samples_stay_within_and_fill_every_part():
    space = Space()
    drawn = space.sample(256)
    for name in ("rates_per_s", "output_spread", "gpu_memory_utilization"):
        low, high = getattr(space, name)
        values = getattr(drawn, name)
        assert values.min() >= low
        assert values.max() <= high
    logs = np.log(drawn.mean_input_tokens)
    assert np.histogram(logs, 16, np.log(space.input_tokens))[0].tolist() == [16] * 16
    assert set(drawn.gpu_memory_bytes) == {round(gib * BYTES_PER_GIB) for gib in space.gpu_memory_gib}
    assert np.mean(drawn.base_rate_per_s == 0) == 0.5
    assert np.all(drawn.max_num_seqs <= drawn.max_num_batched_tokens)


def test_the_first_samples_do_not_depend_on_how_many_follow():
    few, many = Space().sample(5, seed=1), Space().sample(100, seed=1)
    assert few.rates_per_s.tolist() == many.rates_per_s[:5].tolist()
    assert Space().sample(5, seed=2).rates_per_s.tolist() != few.rates_per_s.tolist()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"rate_per_s": 1}, r"rate_per_s: .* did you mean 'rates_per_s'"),
        ({"rates_per_s": [1, 2]}, r"rates_per_s: .* a range such as {min: 1, max: 2}"),
        ({"rates_per_s": {"min": 0, "max": 2}}, r"rates_per_s.min: 0 .* a number > 0"),
        ({"input_tokens": {"min": 9, "max": 3}}, r"input_tokens.max: 3 .* a number >= 9"),
        ({"ranks": []}, r"ranks: .* a list of numbers > 0"),
        ({"ranks": [8.5]}, r"ranks\[0\]: 8.5 .* a whole number"),
        ({"gpu_memory_utilization": {"min": 0.5, "max": 1.5}}, r"gpu_memory_utilization: 1.5 .* <= 1"),
        ([1], r"space: 'list' .* a mapping"),
    ],
)
def test_complaints(content, complaint):
    with pytest.raises(InputError, match=complaint):
        Space.from_mapping(content)
