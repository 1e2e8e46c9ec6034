"""Does the client tell its caller's mistakes from an endpoint that is away?"""

import time

import pytest

from policies.errors import ClusterError, RequestInvalid
from trimtab.client import Client

NOBODY_LISTENS = "http://127.0.0.1:9"


@pytest.mark.parametrize(("url", "observation"), [(NOBODY_LISTENS, [float("nan")]), ("no-scheme:8000/x", [0.0])])
def test_a_request_that_cannot_be_sent_is_not_repeated(
    url: str, observation: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pause(seconds: float) -> None:
        raise AssertionError("paused to try again")

    monkeypatch.setattr(time, "sleep", pause)
    with Client(url, "key", timeout_s=30.0) as client, pytest.raises(RequestInvalid, match="cannot be sent"):
        client.decide(observation)
    with Client(NOBODY_LISTENS, "key", timeout_s=30.0) as client, pytest.raises(AssertionError, match="try again"):
        client.decide([0.0])  # the control: an endpoint that is away is tried again


def test_an_endpoint_that_is_away_is_tried_until_the_deadline() -> None:
    with Client(NOBODY_LISTENS, "key", timeout_s=0.3) as client, pytest.raises(ClusterError, match=r"within 0\.3 s"):
        client.decide([0.0])
