import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.workload import AdapterList, AdapterMix, Adapters

MIX = AdapterMix([0.4, 0.05], [8, 16, 16])
LIST = AdapterList(["a", "b", "c"], [3.0, 1.0, 1.0], [8, 32, 32])


def test_a_mix_is_assigned_round_robin() -> None:
    rates_per_s, ranks = MIX.deal(7)
    assert rates_per_s.tolist() == [0.4, 0.05, 0.4, 0.05, 0.4, 0.05, 0.4]
    assert ranks.tolist() == [8, 16, 16, 8, 16, 16, 8]
    assert MIX.max_count is None


def test_a_list_is_taken_in_its_order() -> None:
    rates_per_s, ranks = LIST.deal(2)
    assert rates_per_s.tolist() == [3.0, 1.0]
    assert ranks.tolist() == [8, 32]
    assert LIST.max_count == 3
    assert LIST.names == ("a", "b", "c")


@pytest.mark.parametrize("adapters", [MIX, LIST, AdapterMix([1.0], [4]), AdapterMix([1, 2, 1, 2], [8, 8])])
def test_classes_count_what_is_assigned(adapters: Adapters) -> None:
    counts = [3, 1, 2, 3] if adapters is LIST else [13, 1, 2, 384, 6]
    classes = adapters.classes(counts)
    assert classes.count.shape == (len(counts), classes.rate_per_s.size)
    pairs = list(zip(classes.rate_per_s.tolist(), classes.rank.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    for count, row in zip(counts, classes.count, strict=True):
        dealt = list(zip(*(part.tolist() for part in adapters.deal(count)), strict=True))
        assert row.tolist() == [dealt.count(pair) for pair in pairs]


def test_max_rank_is_of_the_first_adapters() -> None:
    assert LIST.max_rank([1, 2, 3, 1]).tolist() == [8, 32, 32, 8]
    assert MIX.max_rank(np.array([1, 2])).tolist() == [8, 16]


@pytest.mark.parametrize(
    ("adapters", "count", "message"),
    [
        (LIST, 4, r"adapters: 4 is not allowed; allowed: 1 to 3 \(the adapter list has 3\)"),
        (MIX, -1, "adapters: -1 is not allowed"),
        (MIX, 2.5, "adapters: 2.5 is not allowed"),
        (MIX, 10**9, "adapters: 1000000000 is not allowed"),
        (MIX, "three", "adapters: 'three' is not allowed"),
        (MIX, float("nan"), "adapters: nan is not allowed"),
    ],
)
def test_numbers_of_adapters_that_there_are_not(adapters: Adapters, count: object, message: str) -> None:
    for ask in (
        adapters.check_count,
        adapters.deal,
        lambda a: adapters.classes([1, a]),
        lambda a: adapters.max_rank([a]),
    ):
        if ask in (adapters.check_count, adapters.deal) or not isinstance(count, str):
            with pytest.raises(InputError, match=message):
                ask(count)


@pytest.mark.parametrize("adapters", [LIST, MIX])
def test_no_adapters_have_neither_rates_nor_classes(adapters: Adapters) -> None:
    assert [values.size for values in adapters.deal(0)] == [0, 0]
    for ask in (adapters.check_count, lambda count: adapters.classes([1, count])):
        with pytest.raises(InputError, match="adapters: 0 is not allowed; allowed: 1 to "):
            ask(0)


def test_no_number_of_adapters_is_an_error() -> None:
    with pytest.raises(InputError, match="at least one number of adapters"):
        MIX.classes([])


@pytest.mark.parametrize(
    ("rates", "ranks", "message"),
    [
        ([], [8], "adapters.mix.rates_per_s: 'an empty list' is not allowed; allowed: a list of at least one number"),
        ([0.1], [], "adapters.mix.ranks: 'an empty list' is not allowed; allowed: a list of at least one whole number"),
        (0.1, [8], "adapters.mix.rates_per_s: 0.1 is not allowed; allowed: a list of at least one number"),
        ([0.1, 0], [8], r"adapters.mix.rates_per_s\[1\]: 0 is not allowed; allowed: a number > 0"),
        ([-0.1], [8], r"adapters.mix.rates_per_s\[0\]: -0.1 is not allowed"),
        ([float("nan")], [8], r"adapters.mix.rates_per_s\[0\]: nan is not allowed"),
        ([float("inf")], [8], r"adapters.mix.rates_per_s\[0\]: inf is not allowed"),
        (["fast"], [8], r"adapters.mix.rates_per_s\[0\]: 'fast' is not allowed"),
        ([True], [8], r"adapters.mix.rates_per_s\[0\]: True is not allowed"),
        ([0.1], [0], r"adapters.mix.ranks\[0\]: 0 is not allowed; allowed: a whole number >= 1"),
        ([0.1], [8, -8], r"adapters.mix.ranks\[1\]: -8 is not allowed"),
        ([0.1], [8.5], r"adapters.mix.ranks\[0\]: 8.5 is not allowed"),
        ([0.1], "8", "adapters.mix.ranks: '8' is not allowed"),
    ],
)
def test_bad_mixes_are_told(rates: object, ranks: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdapterMix(rates, ranks)


@pytest.mark.parametrize(
    ("names", "rates", "ranks", "message"),
    [
        ([], [], [], "adapters.list.rate_per_s: 'an empty list' is not allowed"),
        (["a", "a"], [1, 1], [8, 8], "adapters.list: 'a' is not allowed; allowed: every adapter once"),
        (["a"], [1, 1], [8, 8], "adapters.list: '1 names' is not allowed"),
        (["a"], [0], [8], r"adapters.list.rate_per_s\[0\]: 0"),
        (["a"], [1], [0], r"adapters.list.rank\[0\]: 0"),
    ],
)
def test_bad_lists_are_told(names: list[str], rates: list[float], ranks: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdapterList(names, rates, ranks)
