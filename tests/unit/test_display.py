"""What results show of themselves."""

from lora_capacity import place, plan_memory
from lora_capacity.display import Display
from lora_capacity.fleet import Fleet
from tests.unit.test_wrong_types import FLEET, FOUND

HOSTILE = "<b>\x1b[1m"


def test_text_and_html_have_all_of_it_and_act_upon_nothing() -> None:
    shown = Display("title", {"a fact": HOSTILE}, [{"head": 1.23456}], "vllm serve", ["careful"])
    assert shown.text().splitlines() == [
        "title",
        "  a fact  <b>\\x1b[1m",
        "  head",
        "  1.23",
        "  warning: careful",
        "vllm serve",
    ]
    page = shown.html()
    assert "<b>" not in page
    assert "\x1b" not in page
    for part in ("<strong>title", "<th>a fact", "&lt;b&gt;", "<th>head", "<td>1.23", "careful", "<pre>vllm serve"):
        assert part in page


def test_a_recommendation_shows_what_to_run() -> None:
    for shown in (repr(FOUND), FOUND._repr_html_()):
        assert f"{FOUND.max_cpu_loras} adapters (max_cpu_loras), {FOUND.max_loras} slots (max_loras)" in shown
        assert FOUND.serve_command in shown


def test_a_memory_plan_shows_every_configuration() -> None:
    plan = plan_memory("Qwen3-8B", "L4", max_loras=[1, 400], max_model_len=4096)
    assert plan.status.tolist() == [0, 3]
    lines = repr(plan).splitlines()
    assert lines[2].split() == ["start", "ok", "out", "of", "memory"]
    assert [line.split()[0] for line in lines[4:]] == [
        "weights",
        "adapter",
        "activations",
        "CUDA",
        "context,",
        "KV",
        "headroom",
    ]
    assert plan._repr_html_().count("<tr>") == 10


def test_fleets_and_placements_show_their_servers() -> None:
    fleet = Fleet.of(FLEET)
    assert repr(fleet).startswith("1 adapter, 0.1 requests/s; objective fewest-gpus")
    assert "<td>example</td>" in fleet._repr_html_()
    placed = place(fleet, seeds=1)
    assert repr(placed).startswith("1 server, 1 GPU; objective fewest-gpus")
    assert "<td>server-0</td>" in placed._repr_html_()
