"""Who can name a decision so that we take it for ours?"""

import hashlib
import hmac
import secrets

import pytest

from policies.distributions import seed_of
from serve_app import decision_ids
from serve_app.decision_ids import LEASE_S, DecisionIds, KeyedHash, Lease, lease_began_at

IDS = DecisionIds(b"secret")


def test_what_is_named_under_a_lease_is_ours_at_every_replica_and_keeps_its_request_id() -> None:
    lease = IDS.lease(now=1_000_000.9)
    for request_id in ("r1", "a_b-C", "x" * 64):
        decision_id = lease.name(request_id)
        assert DecisionIds(b"secret").is_ours(decision_id) and decision_id.split(".")[0] == request_id
        assert lease_began_at(decision_id) == 1_000_000
    assert DecisionIds(b"secret").is_ours(f"r1:77.{lease.tail('r1')}")  # many of one request share the tag
    assert lease.expires_at == 1_000_000 + LEASE_S


def test_other_secrets_leases_tags_and_request_ids_are_not_ours() -> None:
    lease, other = IDS.lease(now=1e6), IDS.lease(now=1e6)
    _, lease_id, tag = lease.name("r1").split(".")
    assert not DecisionIds(b"other").is_ours(lease.name("r1"))
    for forged in (
        f"r2.{lease_id}.{tag}",
        f"r1.{other.id}.{tag}",
        f"r1.{lease_id}.{tag[:-1]}{'0' if tag[-1] != '0' else '1'}",
        f"r1.{lease_id}.",
        f"r1..{tag}",
        f".{lease_id}.{tag}",
        f"r1.{tag}",
        f"r1.{lease_id}.{lease_id}.{tag}",
        "",
        "..",
    ):
        assert not IDS.is_ours(forged), forged


def test_a_lease_holder_cannot_name_decisions_of_the_endpoint_nor_make_a_longer_lease() -> None:
    lease = IDS.lease(now=1e6)
    without_lease = DecisionIds(lease.key.encode())  # all that a holder knows
    assert not IDS.is_ours(without_lease.name("r1"))
    later = Lease(f"{int(2e9):08x}{lease.id[8:]}", lease.key, 2e9)
    assert not IDS.is_ours(later.name("r1"))
    # and a decision's tag is no lease's key: no request id has the colon that the key is made with
    assert not IDS.is_ours(f"lease:{lease.id}.{lease.key[:12]}")


def test_a_lease_whose_tag_was_made_with_the_secret_itself_would_be_forged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one key for all leases, and a holder can name under any other."""
    monkeypatch.setattr(DecisionIds, "_lease_key", lambda self, lease_id: "the same for all")
    ids = DecisionIds(b"secret")
    stolen = Lease(f"{int(2e9):08x}00000000", ids.lease(now=1e6).key, 2e9)
    assert ids.is_ours(stolen.name("r1"))


def test_made_up_leases_do_not_fill_the_memory() -> None:
    ids = DecisionIds(b"secret")
    for _ in range(decision_ids.MAX_LEASE_HASHES + 10):
        ids.is_ours(f"r.{secrets.token_hex(8)}.000000000000")
    assert len(ids._lease_hashes) <= decision_ids.MAX_LEASE_HASHES


@pytest.mark.parametrize("decision_id", ["r.tag", "", "a.b.c.d", "r.nothex..", "r.zzzzzzzz.t"])
def test_an_id_that_was_not_named_under_a_lease_has_no_beginning(decision_id: str) -> None:
    assert lease_began_at(decision_id) is None


@pytest.mark.parametrize("num_bytes", [0, 1, 32, 63, 64, 65, 200])
def test_the_keyed_hash_is_hmac(num_bytes: int) -> None:
    key = secrets.token_bytes(num_bytes)
    for text in ("", "r1", "x" * 500, "ä"):
        assert KeyedHash(key).tag(text) == hmac.digest(key, text.encode(), "sha256").hex()[:12]


def test_the_seed_of_a_leased_name_is_its_own_and_costs_one_hash_whatever_its_index() -> None:
    """A batch's seeds come from one long hash, up to the index; a local client counts without end."""
    for index in (0, 7, 99_999, 10**15):
        decision_id = f"r1:{index}.{IDS.lease(now=1e6).tail('r1')}"
        assert seed_of(decision_id) == int.from_bytes(hashlib.sha256(decision_id.encode()).digest()[:8]) >> 11
