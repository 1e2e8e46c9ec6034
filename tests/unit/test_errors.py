"""Does every error arrive whole where Ray re-creates it from its arguments?"""

import pickle

import pytest

from policies import errors


def _all_errors(base: type[Exception]) -> list[type[Exception]]:
    return [base] + [found for child in base.__subclasses__() for found in _all_errors(child)]


@pytest.mark.parametrize("kind", _all_errors(errors.TrimtabError))
def test_every_error_survives_being_sent_between_processes(kind: type[Exception]) -> None:
    error = kind("what happened, the numbers, what to do")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) and again.args == error.args


def test_the_status_of_an_invalid_request_travels_too() -> None:
    again = pickle.loads(pickle.dumps(errors.RequestInvalid("too large", 413)))
    assert (again.status, str(again)) == (413, "too large")


def test_an_error_that_keeps_an_argument_for_itself_would_not_survive() -> None:
    class Broken(errors.TrimtabError):
        def __init__(self, message: str, status: int):
            super().__init__(message)
            self.status = status

    globals()["Broken"] = Broken
    Broken.__qualname__ = "Broken"
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(Broken("x", 1)))
