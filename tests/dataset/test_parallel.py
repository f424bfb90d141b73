from __future__ import annotations

import os
import signal

import pytest

from nnssl.dataset.parallel import map_cases
from nnssl.errors import UserError


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def die(how: str) -> str:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(7)
    return how


def refuse(how: str) -> str:
    if how == "user":
        raise UserError("bad header", where="case c1")
    if how == "bug":
        raise ZeroDivisionError("a bug")
    return how


@pytest.mark.parametrize("num_processes", [1, 2])
def test_keeps_order_and_uses_the_processes(num_processes):
    arguments = {f"case_{n}": (n,) for n in (5, 3, 8, 1)}
    results = map_cases(square, arguments, num_processes=num_processes, description="Squares")
    assert list(results) == list(arguments)
    assert [value for value, _ in results.values()] == [25, 9, 64, 1]
    assert all((process == os.getpid()) == (num_processes == 1) for _, process in results.values())


def test_no_cases():
    assert map_cases(square, {}, num_processes=4, description="Squares") == {}


@pytest.mark.parametrize(("how", "found"), [("killed", "SIGKILL"), ("exits", "exit code 7")])
def test_a_dying_worker_names_the_case(how, found):
    arguments = {"good_1": ("ok",), "bad_2": (how,), "good_3": ("ok",), "good_4": ("ok",)}
    with pytest.raises(UserError) as error:
        map_cases(die, arguments, num_processes=2, description="Dying")
    assert "case bad_2" in str(error.value)
    assert found in str(error.value)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_exceptions_of_the_function(num_processes):
    with pytest.raises(UserError, match="bad header") as user_error:
        map_cases(refuse, {"a": ("ok",), "b": ("user",)}, num_processes=num_processes, description="Check")
    assert user_error.value.where == "case c1"
    with pytest.raises(RuntimeError, match=r"(?s)case b.*ZeroDivisionError: a bug"):
        map_cases(refuse, {"a": ("ok",), "b": ("bug",)}, num_processes=num_processes, description="Check")
