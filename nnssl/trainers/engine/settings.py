"""Hyper-parameters: annotated class attributes of trainers, with overrides that are checked against their types."""

from __future__ import annotations

import ast
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from nnssl.errors import UserError


def hyperparameters(trainer: type) -> dict[str, Any]:
    """Hyper-parameters of a trainer class with their defaults, base class first.

    A hyper-parameter is a public annotated class attribute with a value; ``ClassVar`` annotations are facts about
    the method, not settings.
    """
    hints = typing.get_type_hints(trainer)
    names = [name for cls in reversed(trainer.__mro__) for name in vars(cls).get("__annotations__", {})]
    return {
        name: getattr(trainer, name)
        for name in dict.fromkeys(names)
        if not name.startswith("_") and get_origin(hints[name]) is not ClassVar and hasattr(trainer, name)
    }


def parse_overrides(trainer: type, assignments: typing.Sequence[str]) -> dict[str, Any]:
    """Reads ``name=value`` texts (as after ``--set``) into typed values.

    Raises:
        UserError: for an unknown name (with the nearest one), a text that is no assignment, or a value of a type
            that the class does not declare.
    """
    return check_overrides(trainer, dict(_split(text) for text in assignments))


def check_overrides(trainer: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts each value to the declared type of the hyper-parameter; raises ``UserError`` as `parse_overrides`."""
    known = hyperparameters(trainer)
    hints = typing.get_type_hints(trainer)
    checked = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"{trainer.__name__} has no hyper-parameter {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else ""),
                expected=", ".join(known),
            )
        matched, checked[name] = _convert(value, hints[name])
        if not matched:
            raise UserError(
                f"wrong value for hyper-parameter {name!r} of {trainer.__name__}",
                expected=f"{_describe(hints[name])} (default {known[name]!r})",
                found=repr(value),
            )
    return checked


def _split(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UserError("not an assignment", found=repr(text), expected="name=value, such as ema_decay=0.995")
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return name.strip(), value.strip()


def _convert(value: Any, hint: Any) -> tuple[bool, Any]:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint), value
    if origin in (Union, types.UnionType):
        for option in get_args(hint):
            matched, converted = _convert(value, option)
            if matched:
                return True, converted
        return False, value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False, value
        inner = get_args(hint)[0]
        pairs = [_convert(item, inner) for item in value]
        return all(matched for matched, _ in pairs), tuple(item for _, item in pairs)
    if isinstance(value, str) and hint is bool and value.lower() in ("true", "false"):
        return True, value.lower() == "true"
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if hint is int and isinstance(value, bool):
        return False, value
    return isinstance(value, hint), value


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
