import dataclasses
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest
from pydantic import Field

from lora_capacity.errors import InputError
from lora_capacity.schema import (
    Count,
    Document,
    JsonModel,
    Model,
    NotNegative,
    Number,
    Numbers,
    Positive,
    check_fields,
    fields_of_json,
    schema_of,
    validated,
)


class Inner(Model):
    rates: Annotated[np.ndarray, Numbers(Number(0, exclusive=True))]
    kind: Literal["poisson", "gamma"] = "poisson"


class Outer(Model):
    inner: Inner
    share: Annotated[float, Number(0, 1)] = 0.5
    most: Count | None = None
    names: list[str] = Field(["x"], min_length=1)


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    count: Count
    width_s: Positive = 1.0
    listed: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "part")


GOOD = {"inner": {"rates": [1, 0.5]}}


def test_content_becomes_the_model_with_its_defaults():
    found = validated(Outer, GOOD | {"most": 3.0})
    assert found.inner.rates.tolist() == [1.0, 0.5]
    assert (found.inner.kind, found.share, found.most, type(found.most)) == ("poisson", 0.5, 3, int)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1], "file: 'a list' is not allowed; allowed: a mapping with the keys inner, share, most, names"),
        ({}, "file.inner: missing; allowed: a mapping with the keys rates, kind"),
        (GOOD | {"shares": 1}, "file.shares: 'shares' is not allowed; allowed: the keys .*; did you mean 'share'?"),
        ({"inners": {}}, "file.inners: 'inners' .* did you mean 'inner'?"),
        (GOOD | {3: 1}, "file.3: 3 is not allowed; allowed: the keys inner, share, most, names"),
        (GOOD | {"share": 2}, "file.share: 2 is not allowed; allowed: a number >= 0 and <= 1"),
        (GOOD | {"share": True}, "file.share: True is not allowed; allowed: a number >= 0 and <= 1"),
        (GOOD | {"share": "1"}, "file.share: '1' is not allowed"),
        (GOOD | {"share": float("nan")}, "file.share: nan is not allowed"),
        (GOOD | {"share": 10**400}, "file.share: 'a number of more than 308 digits' is not allowed"),
        (GOOD | {"most": 1.5}, "file.most: 1.5 is not allowed; allowed: a whole number >= 1"),
        (GOOD | {"names": "x"}, "file.names: 'x' is not allowed; allowed: a list"),
        (GOOD | {"names": ["x", 3]}, r"file.names\[1\]: 3 is not allowed; allowed: text"),
        ({"inner": {"rates": 3}}, "file.inner.rates: 3 is not allowed; allowed: a list of at least one number"),
        ({"inner": {"rates": [1, 0]}}, r"file.inner.rates\[1\]: 0 is not allowed; allowed: a number > 0"),
        (
            {"inner": {"rates": [1], "kind": "possion"}},
            "file.inner.kind: 'possion' is not allowed; allowed: poisson, gamma; did you mean 'poisson'?",
        ),
    ],
)
def test_a_fault_is_told_in_one_sentence(content, complaint):
    with pytest.raises(InputError, match=f"^{complaint.replace('?', '[?]')}") as caught:
        validated(Outer, content, "file")
    assert "\n" not in str(caught.value)


def test_a_dataclass_is_checked_by_its_annotations():
    part = Part("a", np.int64(3), 2)
    assert (part.count, type(part.count), part.width_s, type(part.width_s)) == (3, int, 2.0, float)
    for given, complaint in [
        ((3, 1), "part.name: 3 is not allowed; allowed: text"),
        (("a", 0), "part.count: 0 is not allowed; allowed: a whole number >= 1"),
        (("a", 1, 0), "part.width_s: 0 is not allowed; allowed: a number > 0"),
        (("a", 1, 1, "no"), "part.listed: 'no' is not allowed; allowed: true or false"),
    ]:
        with pytest.raises(InputError, match=complaint):
            Part(*given)


def test_a_dataclass_is_read_from_json():
    assert Part(**fields_of_json(Part, {"name": "a", "count": 2}, "part")) == Part("a", 2)
    with pytest.raises(InputError, match=r"^part.count: missing; allowed: a whole number >= 1$"):
        fields_of_json(Part, {"name": "a"}, "part")
    with pytest.raises(InputError, match=r"^part.name: missing; allowed: text$"):
        fields_of_json(Part, {"count": 1}, "part")
    with pytest.raises(InputError, match=r"^part: 'a list' is not allowed; allowed: a mapping with the keys name, "):
        fields_of_json(Part, [1], "part")


@dataclasses.dataclass(frozen=True)
class Whole(Document):
    width: Count
    depth: Count = 1

    where: ClassVar[str] = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth > self.width:
            raise InputError("whole.depth", self.depth, "less than the width")


class Holder(JsonModel):
    whole: Whole
    spare: Whole | None = None


def test_an_object_in_a_file_is_read_and_its_faults_named_by_their_place():
    assert validated(Holder, {"whole": {"width": 2}}).whole == Whole(2)
    assert validated(Holder, {"whole": Whole(3), "spare": None}).whole == Whole(3)
    for content, complaint in [
        ({}, "file: whole: missing; allowed: a mapping with the keys width, depth"),
        ({"whole": {"width": 0}}, "file: whole.width: 0 is not allowed; allowed: a whole number >= 1"),
        ({"whole": {"depth": 1}}, "file: whole.width: missing; allowed: a whole number >= 1"),
        ({"whole": {"width": 2}, "spare": {"width": 2, "depth": 3}}, "file: spare.depth: 3 is not allowed"),
        ({"wholes": {}}, "file: wholes: 'wholes' is not allowed; .*; did you mean 'whole'[?]"),
    ]:
        with pytest.raises(InputError, match=f"^{complaint}"):
            validated(Holder, content, "file:")
    schema = Holder.model_json_schema()
    assert schema["properties"]["whole"]["required"] == ["width"]


def test_the_json_schema_tells_keys_kinds_and_bounds():
    found = Outer.model_json_schema()
    assert found["additionalProperties"] is False
    assert found["properties"]["share"] == {"default": 0.5, "maximum": 1, "minimum": 0, "title": "Share"} | {
        "type": "number"
    }
    assert found["properties"]["most"]["anyOf"] == [{"minimum": 1, "type": "integer"}, {"type": "null"}]
    rates = found["$defs"]["Inner"]["properties"]["rates"]
    assert rates["items"] == {"exclusiveMinimum": 0, "type": "number"}
    assert schema_of(Part).model_json_schema()["required"] == ["name", "count"]


def test_numbers_from_0_on_take_0():
    class Any0(Model):
        x: NotNegative

    assert validated(Any0, {"x": 0}).x == 0.0
