import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from sklearn.tree import DecisionTreeRegressor

from lora_capacity.errors import InfeasibleError, InputError
from lora_capacity.measurements import smape
from lora_capacity.reports.rules import draw_rules
from lora_capacity.scenarios import WorkloadBatch
from lora_capacity.surrogate import (
    Space,
    Surrogate,
    describe,
    load_surrogate,
    path_of,
    predict_workload,
    rules_of,
    train_surrogate,
)
from lora_capacity.surrogate.ensemble import ALWAYS_LEFT, Ensemble, rounded
from lora_capacity.surrogate.features import FEATURES, NAMES
from lora_capacity.surrogate.targets import TARGETS
from lora_capacity.surrogate.training import conformal, macro_f1
from lora_capacity.surrogate.trees import KINDS, MOST_LEAVES, Design, train
from lora_capacity.workload import Workload
from tests.cli.conftest import WORKLOAD

SINGLE = 1e-6  # trees compare in single precision


@pytest.fixture(scope="session")
def surrogate(calibration, labels) -> Surrogate:
    return train_surrogate(calibration, labels)


@pytest.fixture(scope="session")
def workload() -> Workload:
    import yaml

    return Workload.from_mapping(yaml.safe_load(WORKLOAD))


def make_design(rows: int = 400, seed: int = 0) -> Design:
    values = np.exp(np.random.default_rng(seed).normal(size=(rows, 4)))
    wanted = np.log(values[:, 0]) * 0.5 + (values[:, 1] > 1.0) * 0.3 + 0.1 * np.log(values[:, 2]) * np.log(values[:, 3])
    return Design(values, np.array([True, True, True, False]), np.array([False, True, False, False]), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_keeps_to_what_must_not_fall(kind):
    design = make_design()
    ensemble = train(kind, design)
    held = make_design(seed=1)
    left = held.wanted - ensemble.predict(held.values)
    assert np.std(left) < 0.4 * np.std(held.wanted)
    more = held.values.copy()
    more[:, 1] *= 1.7
    assert np.all(ensemble.predict(more) >= ensemble.predict(held.values) - 1e-12)


def test_a_few_jumps_hardly_move_boosting_that_nothing_constrains():
    design = make_design(1500)
    jumps = np.where(np.random.default_rng(5).random(1500) < 0.06, 2.0, 0.0)
    free, held = np.zeros(4, bool), make_design(seed=1)
    errors = []
    for rising in (free, design.rising):
        jumping = dataclasses.replace(design, rising=rising, wanted=design.wanted + jumps)
        errors.append(np.mean(np.abs(train("boosting", jumping).predict(held.values) - held.wanted)))
    assert errors[0] < 0.5 * errors[1]


def test_a_tree_as_arrays_answers_as_scikit_learn_does():
    design = make_design()
    ensemble = train("tree", design)
    left = design.wanted - ensemble.beneath(design.values)
    known = DecisionTreeRegressor(
        max_leaf_nodes=MOST_LEAVES,
        max_depth=8,
        min_samples_leaf=8,
        monotonic_cst=design.rising.astype(int),
        random_state=0,
    ).fit(design.values, left)
    expected = known.predict(design.values) + ensemble.beneath(design.values)
    np.testing.assert_allclose(ensemble.predict(design.values), expected, atol=SINGLE)
    reached = np.unique(ensemble.value[0]).size
    assert reached <= known.get_n_leaves() <= MOST_LEAVES


def test_one_row_and_many_rows_agree():
    design = make_design(5000)
    ensemble = train("boosting", design)
    one_by_one = [ensemble.predict(row[np.newaxis])[0] for row in design.values[-50:]]
    np.testing.assert_allclose(one_by_one, ensemble.predict(design.values)[-50:], atol=SINGLE)


def test_a_path_leads_to_the_leaf_that_answers():
    design = make_design()
    ensemble = train("tree", design)
    for row in design.values[:20]:
        inside = np.ones(len(design.values), bool)
        for feature, threshold, above in ensemble.path(row):
            inside &= (design.values[:, feature] > threshold) == above
        alike = design.values[inside]
        trees = ensemble.predict(alike) - ensemble.beneath(alike)
        assert np.ptp(trees) < SINGLE


def test_an_ensemble_survives_json_and_other_shapes_are_refused():
    ensemble = train("boosting", make_design())
    content = json.loads(json.dumps(ensemble.to_json()))
    values = make_design(seed=2).values
    np.testing.assert_allclose(Ensemble.from_json(content, "e").predict(values), ensemble.predict(values), atol=SINGLE)
    with pytest.raises(InputError, match=r"e: .* a JSON object"):
        Ensemble.from_json([], "e")
    with pytest.raises(InputError, match="arrays of numbers"):
        Ensemble.from_json({name: value for name, value in content.items() if name != "value"}, "e")
    unknown = [[99 for _ in row] for row in content["feature"]]
    for changed in ({"linear": [1.0]}, {"feature": unknown}, {"value": 1.0}, {"value": [1.0]}):
        with pytest.raises(InputError, match="those of one ensemble"):
            Ensemble.from_json(content | changed, "e")


def test_a_trained_surrogate_answers_near_its_labels(surrogate, labels, calibration):
    # Few labels: bounds are far wider than what thousands reach.
    described = describe(calibration, labels.workloads)
    slots = np.exp(surrogate.of("slots").predict(described.values))
    assert smape(slots, labels.optima.max_loras) < 15.0
    assert surrogate.scores["best"]["starved_macro_f1"] > 0.8
    assert set(surrogate.best) == set(TARGETS)
    assert surrogate.about["trained_on"] + surrogate.about["held_back"] == len(labels)


@pytest.mark.slow
def test_equal_seeds_give_equal_files_and_other_seeds_others(surrogate, calibration, labels, tmp_path):
    surrogate.write(tmp_path / "a")  # of seed 0
    for name, seed in (("b", 0), ("c", 1)):
        train_surrogate(calibration, labels, seed=seed).write(tmp_path / name)
    first, second, third = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second != third


def test_a_file_gives_the_surrogate_back_and_changed_ones_are_refused(surrogate, tmp_path):
    path = tmp_path / "s.json"
    surrogate.write(path)
    read = load_surrogate(path)
    assert read.to_json() == json.loads(path.read_text("utf-8"))
    content = json.loads(path.read_text("utf-8"))
    content["ensembles"]["slots"]["tree"]["intercept"] += 0.1
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"s.json: digest: .* it was changed: train again"):
        load_surrogate(path)
    path.write_text(json.dumps(content | {"schema_version": 99}), encoding="utf-8")
    with pytest.raises(InputError, match=r"schema_version: 99 .* update lora-capacity"):
        load_surrogate(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="not JSON"):
        load_surrogate(path)
    with pytest.raises(InputError, match=r"file not found: .*none.json"):
        load_surrogate(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"surrogate: 'llama' .* or a .json file"):
        load_surrogate("llama")


def test_labels_of_another_calibration_or_too_few_are_refused(calibration, labels):
    other = dataclasses.replace(calibration, capacity_error=0.5)
    with pytest.raises(InputError, match=r"labels of .* as it is"):
        train_surrogate(other, labels)
    with pytest.raises(InputError, match="10 feasible workloads"):
        train_surrogate(calibration, labels.take(np.arange(10)))


def test_an_answer_has_intervals_a_verdict_and_the_twins_check(surrogate, calibration, workload):
    answer = predict_workload(surrogate, calibration, workload, given=(200, 12), check=True)
    assert 1 <= answer.max_loras <= answer.max_cpu_loras
    for name, value in (("adapters", answer.max_cpu_loras), ("slots", answer.max_loras)):
        low, high = answer.twin_intervals[name]
        assert low <= value <= high
        assert answer.intervals[name][0] <= low <= high <= answer.intervals[name][1]
    assert answer.given["starved"]
    assert answer.check["starved"]
    assert answer.check["offered_tokens_per_s"] == pytest.approx(200 * 0.3 * (223 + 197), rel=1e-3)
    wider = predict_workload(surrogate, calibration, workload, level=0.95)
    assert wider.twin_intervals["slots"][1] >= answer.twin_intervals["slots"][1]


def test_an_answer_warns_outside_what_was_trained_on(surrogate, calibration, workload):
    assert predict_workload(surrogate, calibration, workload).warnings == ()
    dense = dataclasses.replace(workload, base_rate_per_s=20.0)
    assert any(each.startswith("base_share") for each in predict_workload(surrogate, calibration, dense).warnings)
    changed = dataclasses.replace(calibration, capacity_error=0.5)
    assert "label and train again" in predict_workload(surrogate, changed, workload).warnings[0]


def test_bad_questions(surrogate, calibration, workload):
    with pytest.raises(InputError, match="did you mean 'tree'"):
        predict_workload(surrogate, calibration, workload, kind="trees")
    with pytest.raises(InputError, match=r"level: 0\.7"):
        predict_workload(surrogate, calibration, workload, level=0.7)
    with pytest.raises(InputError, match="max_loras: 9"):
        predict_workload(surrogate, calibration, workload, given=(8, 9))
    with pytest.raises(InfeasibleError, match="too small"):
        predict_workload(surrogate, calibration, workload, settings={"gpu_memory_utilization": 0.3})


def test_rules_are_few_rounded_and_tell_their_loss(surrogate):
    for target in TARGETS:
        rules = rules_of(surrogate, target)
        assert 1 <= rules.leaves <= MOST_LEAVES
        text = rules.text()
        assert text.count("factor ") >= rules.leaves
        assert f"{rules.rounded_score:.3g} with rounded figures" in text
        assert rules.to_json()["leaves"] == rules.leaves
        assert draw_rules(rules.to_json()).count("×") == rules.leaves
    with pytest.raises(InputError, match="did you mean 'slots'"):
        rules_of(surrogate, "slot")


def test_the_path_of_an_answer_names_features(surrogate, calibration, workload):
    described = describe(calibration, WorkloadBatch.of(workload, calibration))
    for step in path_of(surrogate, "slots", described.values[0]):
        assert described.values[0, NAMES.index(step["feature"])] == step["value"]
        assert (step["value"] > step["threshold"]) == step["above"]


def test_features_that_grow_with_memory_do_and_the_others_stay(calibration):
    few = Space(gpu_memory_gib=(63.43,)).sample(12, seed=4)
    more = dataclasses.replace(few, gpu_memory_bytes=few.gpu_memory_bytes * 1.3)
    before, after = (describe(calibration, each).values for each in (few, more))
    for place, feature in enumerate(FEATURES):
        if feature.grows_with_memory:
            assert np.all(after[:, place] >= before[:, place]), feature.name
        else:
            np.testing.assert_allclose(after[:, place], before[:, place], rtol=1e-6, err_msg=feature.name)


def test_who_waits_longer_brings_more_and_takes_fewer_slots_to_fill_the_batch(calibration):
    short = Space(rates_per_s=(0.05, 0.5), max_pending=None).sample(12, seed=4)
    names = ("running_per_turn", "slots_for_full_batch", "slots_for_memory")
    places = [NAMES.index(name) for name in names]
    before, after = (
        describe(calibration, dataclasses.replace(short, horizon_s=short.horizon_s * factor)).values[:, places]
        for factor in (1.0, 4.0)
    )
    assert np.all(before[:, 0] > 1.0)
    assert np.all(after[:, 0] > before[:, 0])
    assert np.all(after[:, 1:] < before[:, 1:])


def test_figures_are_rounded_sensibly():
    assert rounded(np.array([0.0, 123.4, 0.0456, -7.77, 99.9])).tolist() == pytest.approx([0.0, 120, 0.046, -7.8, 100])


def test_scores():
    assert smape([1.0, 3.0], [1.0, 1.0]) == pytest.approx(25.0)
    assert macro_f1(np.array([True, False, False]), np.array([True, False, True])) == pytest.approx(2.0 / 3.0)
    assert conformal(np.arange(1.0, 10.0), 0.9) == 9.0
    assert conformal(np.arange(1.0, 20.0), 0.5) == 10.0


def test_features_of_a_target():
    assert len(TARGETS["starved"].features) == len(TARGETS["slots"].features) + 4
    assert np.float32(ALWAYS_LEFT) < np.inf


def test_answers_need_no_scikit_learn():
    code = "import sys, lora_capacity.surrogate; print([name for name in sys.modules if name.startswith('sklearn')])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
