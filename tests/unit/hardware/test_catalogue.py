import pytest

from lora_capacity.errors import InputError
from lora_capacity.hardware import catalogue, find_gpu
from lora_capacity.units import BYTES_PER_GIB


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("rtx 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("gb10", "GB10"),
    ],
)
def test_a_gpu_is_found_by_what_drivers_and_people_call_it(given, name):
    assert find_gpu(given).name == name


@pytest.mark.parametrize(
    ("given", "words"),
    [("A100", "A100-40GB or A100-80GB"), ("RTX 4009", "RTX 4090"), ("l4s", "L40S"), ("", "known: T4, V100-16GB")],
)
def test_an_unknown_gpu_is_told_with_the_nearest(given, words):
    with pytest.raises(InputError) as error:
        find_gpu(given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_no_two_gpus_share_a_name():
    names = [each for gpu in catalogue().values() for each in (gpu.name, *gpu.aliases)]
    assert {find_gpu(each).name for each in names} == set(catalogue())
    assert all(each in (gpu.name, *gpu.aliases) for each in names for gpu in [find_gpu(each)])


# Sizes that are printed on the cards, and what data sheets say of the ratio of arithmetic by width and of the peak:
# the H100's 132 multiprocessors compute 2,048 dense 16-bit multiply-adds a cycle at its tensor clock of 1.83 GHz.
def test_the_numbers_hang_together():
    printed = {
        "T4": 16,
        "L4": 24,
        "RTX 4090": 24,
        "A100-40GB": 40,
        "L40S": 48,
        "H100-80GB": 80,
        "H200": 141,
        "MI300X": 192,
    }
    for name, gib in printed.items():
        assert 0.9 * gib < find_gpu(name).gpu.memory_bytes / BYTES_PER_GIB <= gib
    for gpu in catalogue().values():
        rates = gpu.flop_per_s
        assert rates["float16"] >= rates.get("bfloat16", 0) > 0 or "bfloat16" not in rates
        assert 1.9 < rates.get("fp8", 2 * rates["float16"]) / rates["float16"] < 2.1
        assert 1.9 < rates.get("int8", 2 * rates["float16"]) / rates["float16"] < 4.1
        # Weights are read from memory far slower than they could be multiplied: by 35 (H20) to 800 operations a byte.
        assert 35 < rates["float16"] / gpu.bandwidth_bytes_per_s < 800
        assert gpu.source.count("data sheet") + gpu.source.count("white paper") >= 1
    h100 = find_gpu("H100")
    assert h100.multiprocessors * 2048 * 2 * 1.83e9 == pytest.approx(h100.flop_per_s["bfloat16"], rel=0.01)
    assert len(catalogue()) >= 30
