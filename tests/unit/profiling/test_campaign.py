from typing import Any

import pytest
import yaml
from lora_capacity_profiling.campaign import Campaign, campaign_names, load_campaign
from lora_capacity_profiling.planning import estimate_s, plan_servers
from lora_capacity_profiling.points import AdapterBatch, Decode, KvCapacity, Loading, Prefill, ServingRun

from lora_capacity.errors import InputError

SMALL = """
server: {max_num_seqs: 8, max_num_batched_tokens: 64}
environment: {A_VARIABLE: 1}
repeats: 2
kv_capacity:
  - {max_loras: [2, 4], max_lora_rank: 8}
decode: {batch_size: [1, 8], output_tokens: 16}
prefill: {batch_size: 1, input_tokens: [8, 32], num_prompts: 4}
adapters:
  - {max_loras: 2, max_lora_rank: [8, 16], served_adapters: [1, 2, 4], batch_size: [1, 4], output_tokens: 16}
loading:
  - {max_lora_rank: [8, 16], adapter_rank: [8, 16], adapters: 4, rounds: 2}
serving:
  - max_loras: 2
    max_cpu_loras: 3
    max_lora_rank: 8
    ranks: [8]
    rate_shares: [2, 1]
    load: [0.5]
    input_tokens: {mean: 6, std: 2, min: 1, max: 12}
    output_tokens: {mean: 6, std: 2, min: 1, max: 12}
    horizon_s: 2
"""


def small(**changes: Any) -> Campaign:
    return Campaign.from_mapping({**yaml.safe_load(SMALL), **changes}, "small")


# GPU hours (hours of the CPUs for the last) that the files and the documentation state.
@pytest.mark.parametrize(
    ("name", "hours"), [("quick", 0.6), ("standard", 2.0), ("thorough", 14.0), ("quick-cpu", 0.07)]
)
def test_campaigns_of_the_package_take_as_long_as_they_say(name: str, hours: float) -> None:
    campaign = load_campaign(name)
    assert campaign.description
    device = "cpu" if name.endswith("cpu") else "gpu"
    estimated_s = sum(estimate_s(campaign, plan.points, device) for plan in plan_servers(campaign))
    assert estimated_s / 3600 == pytest.approx(hours, rel=0.15)
    kinds = {type(point) for point in campaign.points}
    assert kinds | {KvCapacity} == {KvCapacity, Decode, Prefill, AdapterBatch, Loading, ServingRun}
    names = [point.id for point in campaign.points]
    assert len(set(names)) == len(names)


def test_every_campaign_of_the_package_is_named() -> None:
    assert set(campaign_names()) == {"quick", "standard", "thorough", "quick-cpu"}


def test_grids_are_multiplied_out_but_for_what_makes_no_sense() -> None:
    points = small().points
    assert [each for each in points if isinstance(each, KvCapacity)] == [KvCapacity(2, 8), KvCapacity(4, 8)]
    batches = [each for each in points if isinstance(each, AdapterBatch)]
    assert {(each.served_adapters, each.batch_size) for each in batches} == {(1, 1), (1, 4), (2, 4)}
    assert len(batches) == 6
    assert {(each.max_lora_rank, each.adapter_rank) for each in points if isinstance(each, Loading)} == {
        (8, 8),
        (16, 8),
        (16, 16),
    }
    assert small().environment == {"A_VARIABLE": "1"}


def test_fewest_servers_on_which_all_can_be_measured() -> None:
    plans = {plan.name: plan for plan in plan_servers(small())}
    assert {name: (plan.max_cpu_loras, dict(plan.adapters), len(plan.points)) for name, plan in plans.items()} == {
        "no-lora": (0, {}, 4),
        "slots1-rank8": (2, {8: 4}, 1),
        "slots1-rank16": (2, {8: 4, 16: 4}, 2),
        "slots2-rank8": (3, {8: 3}, 5),
        "slots2-rank16": (2, {16: 2}, 3),
        "slots4-rank8": (4, {}, 1),
    }
    assert plan_servers(small())[0].name == "no-lora"


def test_flags_of_a_server() -> None:
    plans = {plan.name: plan for plan in plan_servers(small())}
    assert plans["no-lora"].flags(small(), {}) == {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    assert plans["slots2-rank16"].flags(small(), {16: "x"}) == {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "enable_lora": True,
        "max_loras": 2,
        "max_cpu_loras": 2,
        "max_lora_rank": 16,
        "lora_modules": ["r16-0=x", "r16-1=x"],
    }
    assert "lora_modules" not in plans["slots4-rank8"].flags(small(), {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoding": []}, "did you mean 'decode'?"),
        ({"decode": {"batch_size": 1}}, "small: decode[0].output_tokens"),
        ({"decode": {"batch_size": [0], "output_tokens": 4}}, "small: decode[0].batch_size: 0 is not allowed"),
        ({"decode": {"batch_size": 9, "output_tokens": 4}}, "at most max_num_seqs, 8"),
        ({"decode": {"batch": 9, "output_tokens": 4}}, "did you mean 'batch_size'?"),
        ({"decode": [3]}, "small: decode[0]: 3 is not allowed; allowed: a mapping"),
        ({"loading": {"max_lora_rank": 8, "adapter_rank": 16, "adapters": 4, "rounds": 1}}, "at least one combination"),
        ({"server": {"max_num_seqs": 8}}, "server.max_num_batched_tokens"),
        ({"server": {"max_num_seqs": 8.0, "max_num_batched_tokens": 64}}, "without a decimal point"),
        ({"server": [1]}, "small: server: 'a list' is not allowed; allowed: a mapping"),
        ({"environment": 1}, "small: environment: 1 is not allowed; allowed: a mapping"),
        ({"repeats": 0}, "small: repeats"),
        ({"serving": {"max_loras": 2, "input_tokens": 3}}, "a law of lengths such as"),
    ],
)
def test_bad_campaigns_are_refused_with_a_reason(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        small(**changes)
    assert words in str(error.value)


def test_campaign_without_a_point_is_refused() -> None:
    with pytest.raises(InputError, match="at least one of kv_capacity"):
        Campaign.from_mapping({"server": {"max_num_seqs": 1, "max_num_batched_tokens": 1}}, "empty")
    with pytest.raises(InputError, match="did you mean 'quick'"):
        load_campaign("quik")
