"""Does a replica let in exactly the keys that are valid now, within their limits, and stay small whatever is presented?"""

import logging
import tracemalloc
from pathlib import Path

import pytest

from policies.errors import Forbidden, Overloaded, RequestRefused, ServiceUnavailable, Unauthorized
from policies.integrity import sha256_hex
from policies.storage import Storage, open_storage
from serve_app import keys as ring_module
from serve_app.keys import KeyRing, Usage

NOW = 1_000_000.0


class Clock:
    """A wall clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "data")


@pytest.fixture
def ring(storage: Storage, clock: Clock) -> KeyRing:
    return KeyRing(storage.api_keys.path, clock=clock)


def header(key: str) -> bytes:
    return b"Bearer " + key.encode()


def new_key(storage: Storage, ring: KeyRing, name: str = "shop", *scopes: str, **limits: float) -> bytes:
    """Return the header of a key that the ring knows of."""
    _, key = storage.api_keys.create(name, scopes or ("decide",), now=NOW, **limits)
    ring.refresh()
    return header(key)


def is_let_in(ring: KeyRing, authorization: bytes | None, scope: str = "decide") -> bool:
    try:
        ring.check(authorization, scope)
    except RequestRefused:
        return False
    return True


# --- who is let in ---


def test_a_valid_key_is_told_by_name_and_scopes(storage: Storage, ring: KeyRing) -> None:
    shop = new_key(storage, ring, "shop", "decide", "feedback")
    for _ in range(2):  # looked up, and recognised
        key = ring.check(shop, "feedback")
        assert (key.name, key.scopes) == ("shop", {"decide", "feedback"})
    assert ring.check(header(storage.api_keys.owner_key()), "approve").name == "owner"


def test_nothing_but_the_whole_key_in_the_right_scheme_is_let_in(storage: Storage, ring: KeyRing) -> None:
    shop = new_key(storage, ring)
    key = shop.removeprefix(b"Bearer ")
    sha256 = sha256_hex(key).encode()
    wrong = [None, b"", b"Bearer", b"Bearer ", key, b"Basic " + key, b"Digest " + key]  # of the last, the key is where ours is
    wrong += [shop + b" ", b"Bearer  " + key, shop[:-1], shop + b"x"]
    wrong += [b"Bearer " + sha256, b"Bearer " + bytes.fromhex(sha256.decode()), b"Bearer K00000000", b"Bearer shop", b"\xff" * 9]
    assert [presented for presented in wrong if is_let_in(ring, presented)] == []
    assert is_let_in(ring, shop) and is_let_in(ring, b"bearer " + key), "the scheme's name may be written in small letters"


def test_a_refusal_is_the_same_for_a_key_that_never_was_that_expired_and_that_was_revoked(
    storage: Storage, ring: KeyRing, clock: Clock
) -> None:
    expired = new_key(storage, ring, "expired", expires_at=NOW + 1)
    revoked = new_key(storage, ring, "revoked")
    storage.api_keys.revoke("revoked", now=NOW)
    ring.refresh()
    clock.now = NOW + 1
    words = set()
    for presented in (expired, revoked, b"Bearer tt-never"):
        with pytest.raises(Unauthorized, match=r"not valid.*apikey list") as refusal:
            ring.check(presented, "decide")
        words.add(str(refusal.value))
    assert len(words) == 1
    with pytest.raises(Unauthorized, match="is missing"):
        ring.check(None, "decide")


def test_a_key_without_the_scope_is_told_what_it_has_and_what_is_needed(storage: Storage, ring: KeyRing) -> None:
    shop = new_key(storage, ring, "shop", "decide", "feedback")
    with pytest.raises(Forbidden, match="'shop' has the scope decide, feedback, this needs read;"):
        ring.check(shop, "read")
    with pytest.raises(Forbidden, match="this needs read or operate;"):
        ring.check(shop, "read", "operate")
    assert ring.check(shop, "read", "decide").name == "shop"


def test_a_key_that_is_refused_for_its_scope_uses_up_nothing(storage: Storage, ring: KeyRing) -> None:
    shop = new_key(storage, ring, requests_per_s=1)
    for _ in range(5):
        with pytest.raises(Forbidden):
            ring.check(shop, "read")
    assert is_let_in(ring, shop)


# --- changes ---


def test_a_revoked_key_is_refused_after_one_refresh(storage: Storage, ring: KeyRing) -> None:
    shop, other = new_key(storage, ring), new_key(storage, ring, "other")
    assert is_let_in(ring, shop)  # it is recognised by its header from here on
    storage.api_keys.revoke("shop", now=NOW)
    assert is_let_in(ring, shop), "the control: it is the refresh that refuses"
    ring.refresh()
    assert not is_let_in(ring, shop) and is_let_in(ring, other)


def test_an_expired_key_is_refused_without_a_refresh(storage: Storage, ring: KeyRing, clock: Clock) -> None:
    shop = new_key(storage, ring, expires_at=NOW + 60)
    storage.api_keys.path.unlink()
    clock.now = NOW + 59.9
    assert is_let_in(ring, shop)
    clock.now = NOW + 60
    assert not is_let_in(ring, shop)


def test_a_new_key_is_let_in_after_one_refresh(storage: Storage, ring: KeyRing) -> None:
    _, key = storage.api_keys.create("shop", ["decide"], now=NOW)
    assert not is_let_in(ring, header(key))
    ring.refresh()
    assert is_let_in(ring, header(key))


def test_what_is_recognised_during_a_refresh_is_forgotten_with_the_old_keys(storage: Storage, ring: KeyRing) -> None:
    """The request and the refresh are in two threads: the look-up may end after the new keys are in force."""
    shop = new_key(storage, ring)
    old = ring._table
    storage.api_keys.revoke("shop", now=NOW)
    ring.refresh()
    assert ring_module._look_up(old, shop).name == "shop"  # the request that was slower than the refresh
    assert not is_let_in(ring, shop)


def test_an_unchanged_file_is_not_read_again(storage: Storage, ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(data: bytes, source: str) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(ring_module, "parse_keys", parse)
    ring.refresh()
    storage.api_keys.create("shop", ["decide"], now=NOW)
    with pytest.raises(AssertionError, match="read again"):
        ring.refresh()


@pytest.mark.parametrize("overlap_s", [5.0, 0.0])
def test_no_request_fails_while_keys_are_rotated(storage: Storage, ring: KeyRing, clock: Clock, overlap_s: float) -> None:
    """A client asks ten times a second and takes each new key three seconds late. An overlap of 0 is the negative control."""
    current = arriving = new_key(storage, ring)
    failed = 0
    for step in range(600):  # a minute
        clock.now = NOW + step / 10
        if step % 100 == 50:
            arriving = header(storage.api_keys.rotate("shop", now=clock.now, overlap_s=overlap_s)[1])
        if step % 100 == 80:
            current = arriving
        if step % 10 == 0:
            ring.refresh()
        failed += not is_let_in(ring, current)
    # Without an overlap: from the refresh at step 50, which comes after the rotation, until step 80, six times.
    assert failed == (0 if overlap_s else 6 * 30)


# --- a file that cannot be used ---


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b'{"schema_version":1}'), lambda path: path.unlink()])
def test_the_last_good_keys_stay_in_force_and_it_is_said_once(
    storage: Storage, ring: KeyRing, damage, caplog: pytest.LogCaptureFixture
) -> None:
    shop, good = new_key(storage, ring), storage.api_keys.path.read_bytes()
    assert ring.error is None
    damage(storage.api_keys.path)
    with caplog.at_level(logging.INFO, logger="serve_app.keys"):
        for _ in range(3):
            ring.refresh()
        assert ring.error is not None and "api_keys.json" in ring.error
        assert is_let_in(ring, shop) and not is_let_in(ring, b"Bearer tt-unknown")
        storage.api_keys.path.write_bytes(good)
        storage.api_keys.revoke("shop", now=NOW)
        ring.refresh()
    assert ring.error is None and not is_let_in(ring, shop)
    events = [record.message.split()[0] for record in caplog.records]
    assert events.count("event=keys_unreadable") == 1 and events.count("event=keys_readable_again") == 1


def test_a_ring_that_never_read_a_good_file_tells_clients_to_try_elsewhere(storage: Storage, clock: Clock) -> None:
    """401 would make a client with a good key give up."""
    owner, good = header(storage.api_keys.owner_key()), storage.api_keys.path.read_bytes()
    storage.api_keys.path.write_bytes(b"{")
    ring = KeyRing(storage.api_keys.path, clock=clock)
    assert not ring.is_loaded and ring.error is not None
    with pytest.raises(ServiceUnavailable, match="could not read the API keys") as refusal:
        ring.check(owner, "decide")
    assert str(storage.root) not in str(refusal.value), "whoever asks has shown no key yet"
    storage.api_keys.path.write_bytes(good)
    ring.refresh()
    assert ring.is_loaded and is_let_in(ring, owner)


# --- limits ---


def accepted(usage: Usage, times: list[float]) -> int:
    count = 0
    for now in times:
        try:
            usage.take(now)
            count += 1
        except Overloaded:
            pass
    return count


def usage_of(requests_per_s: float | None = None, max_concurrent: int | None = None) -> Usage:
    return Usage("shop", requests_per_s=requests_per_s, max_concurrent=max_concurrent, now=NOW)


def test_a_key_sends_a_second_s_worth_at_once_and_then_at_its_rate() -> None:
    usage = usage_of(10)
    assert accepted(usage, [NOW] * 12) == 10
    assert accepted(usage, [NOW + 0.1] * 5) == 1
    assert accepted(usage, [NOW + 0.35] * 5) == 2  # 2.5 tokens, the half is kept
    assert accepted(usage, [NOW + 0.4] * 5) == 1
    assert accepted(usage, [NOW + 3600] * 50) == 10, "an idle hour saves up no more than a second"


def test_an_even_stream_at_the_rate_is_never_refused() -> None:
    """The negative control, a tenth faster, is: of 1,100 in 99.9 s pass the burst of 10 and 10 per second, 10 + 999."""
    assert accepted(usage_of(10), [NOW + step / 10 for step in range(1000)]) == 1000
    assert accepted(usage_of(10), [NOW + step / 11 for step in range(1100)]) == 1009


def test_a_bucket_without_a_bottom_would_let_an_idle_key_flood_the_replica() -> None:
    usage = usage_of(10)
    usage._capacity = float("inf")  # the broken bucket: what is not used is saved up for ever
    assert accepted(usage, [NOW + 3600] * 50_000) == 36_010


@pytest.mark.parametrize(("requests_per_s", "retry_after_s"), [(10.0, 1), (1.0, 1), (0.25, 4), (0.01, 100)])
def test_a_refusal_says_when_to_come_back(requests_per_s: float, retry_after_s: int) -> None:
    usage = usage_of(requests_per_s)
    with pytest.raises(
        Overloaded, match=rf"may send {requests_per_s:g} requests per second.*again in {retry_after_s} s"
    ) as refusal:
        for _ in range(100):
            usage.take(NOW)
    assert refusal.value.retry_after_s == retry_after_s
    usage.take(NOW + retry_after_s)


def test_a_clock_that_goes_back_neither_locks_out_nor_fills_up() -> None:
    usage = usage_of(10)
    assert accepted(usage, [NOW] * 12) == 10
    assert accepted(usage, [NOW - 1000] * 5) == 0
    assert accepted(usage, [NOW - 999.9] * 5) == 1


def test_reading_the_file_again_gives_back_neither_tokens_nor_places(storage: Storage, ring: KeyRing) -> None:
    shop = new_key(storage, ring, requests_per_s=2, max_concurrent=1)
    key = ring.check(shop, "decide")
    key.usage.begin()
    assert is_let_in(ring, shop) and not is_let_in(ring, shop)
    new_key(storage, ring, "other")  # another state of the file
    assert not is_let_in(ring, shop)
    with pytest.raises(Overloaded, match="has 1 requests in flight"):
        ring.recognise(shop).usage.begin()
    key.usage.end()  # of the request that began before
    ring.recognise(shop).usage.begin()


def test_a_key_that_was_recognised_is_refused_once_it_is_revoked_or_over(storage: Storage, ring: KeyRing, clock: Clock) -> None:
    shop, other = new_key(storage, ring), new_key(storage, ring, "other", expires_at=clock.now + 10)
    keys = [ring.recognise(shop), ring.recognise(other)]
    for key in keys:
        ring.admit(key, "decide")
    storage.api_keys.revoke("shop", now=clock.now)
    ring.refresh()
    with pytest.raises(Unauthorized):
        ring.admit(keys[0], "decide")
    ring.admit(keys[1], "decide")  # the file was read again, and it is another object there
    clock.now += 10
    with pytest.raises(Unauthorized):
        ring.admit(keys[1], "decide")


def test_no_more_than_the_limit_are_in_flight_and_each_place_is_given_back() -> None:
    usage = usage_of(max_concurrent=2)
    with usage:
        with usage, pytest.raises(Overloaded, match=r"'shop' has 2 requests in flight.*--max-concurrent"), usage:
            raise AssertionError("a third was let in")
        with pytest.raises(ZeroDivisionError), usage:
            raise ZeroDivisionError  # a request that fails gives its place back too
        with usage:
            pass


def test_a_key_without_limits_has_none(storage: Storage, ring: KeyRing) -> None:
    shop = new_key(storage, ring)
    usage = ring.check(shop, "decide").in_flight()
    for _ in range(10_000):
        usage.begin()
        assert is_let_in(ring, shop)


# --- bounds ---


class Collector(KeyRing):
    """The broken ring: remembers every header, also of those it refused."""

    def recognise(self, authorization: bytes | None):
        self._table.by_header.setdefault(authorization, None)
        return super().recognise(authorization)


@pytest.mark.parametrize(("kind", "num_keys"), [(KeyRing, 100_000), (Collector, 1000)])
def test_a_hundred_thousand_unknown_keys_leave_no_trace(
    storage: Storage, clock: Clock, kind: type[KeyRing], num_keys: int
) -> None:
    """The ring that remembers whom it refused is the negative control."""
    ring = kind(storage.api_keys.path, clock=clock)
    owner = header(storage.api_keys.owner_key())
    assert is_let_in(ring, owner) and not is_let_in(ring, b"Bearer x")
    tracemalloc.start()
    for number in range(num_keys):
        assert not is_let_in(ring, b"Bearer tt-guess-%d" % number)
    grown_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (grown_bytes < 10_000) == (kind is KeyRing), grown_bytes
    assert is_let_in(ring, owner)


def test_a_valid_key_in_every_spelling_is_remembered_once(storage: Storage, ring: KeyRing) -> None:
    owner = storage.api_keys.owner_key().encode()
    for number in range(64):
        scheme = bytes(letter ^ (0x20 if number >> place & 1 else 0) for place, letter in enumerate(b"bearer"))
        assert is_let_in(ring, scheme + b" " + owner)
    assert len(ring._table.by_header) == 1
