from __future__ import annotations

from typing import ClassVar, Literal

import pytest

from nnssl.errors import UserError
from nnssl.trainers.engine.settings import check_overrides, hyperparameters, parse_overrides


class Base:
    fact: ClassVar[int] = 1
    num_epochs: int = 10
    rate: float = 0.5
    no_annotation = 3


class Method(Base):
    weight: float = 0.1
    use_it: bool = True
    mode: Literal["a", "b"] = "a"
    size: int | None = None
    edges: tuple[float, ...] = (0.5, 0.5)
    module: object  # declared, but not a setting: it has no value


def test_lists_annotated_values_of_all_bases():
    assert list(hyperparameters(Method)) == ["num_epochs", "rate", "weight", "use_it", "mode", "size", "edges"]


def test_a_subclass_may_change_a_default_without_annotation():
    class Child(Method):
        rate = 0.25

    assert hyperparameters(Child)["rate"] == 0.25


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("weight=0.3", 0.3),
        ("weight=1", 1.0),
        ("num_epochs=5", 5),
        ("use_it=False", False),
        ("use_it=false", False),
        ("mode=b", "b"),
        ("size=4", 4),
        ("size=None", None),
        ("edges=(1, 2.5)", (1.0, 2.5)),
    ],
)
def test_reads_typed_values(text, value):
    result = parse_overrides(Method, [text])[text.split("=")[0]]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    "text",
    ["weight=high", "num_epochs=2.5", "num_epochs=True", "use_it=1", "mode=c", "size=x", "edges=3", "edges=('a',)"],
)
def test_refuses_wrong_types(text):
    with pytest.raises(UserError, match="wrong value") as error:
        parse_overrides(Method, [text])
    assert "default" in error.value.expected


def test_unknown_name_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'weight'"):
        check_overrides(Method, {"wieght": 1.0})


@pytest.mark.parametrize("text", ["weight", "=3", ""])
def test_refuses_what_is_no_assignment(text):
    with pytest.raises(UserError, match="not an assignment"):
        parse_overrides(Method, [text])
