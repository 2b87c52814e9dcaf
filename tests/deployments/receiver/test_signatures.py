"""Nothing passes but what was signed with one of the hook's keys, as it was signed."""

from __future__ import annotations

import ast
import base64
import inspect
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deployments.receiver import signatures
from deployments.receiver.refused import Refused
from deployments.receiver.signatures import (
    sign_github,
    sign_standard,
    verify_bearer,
    verify_github,
    verify_standard,
)

KEY = b"a-secret-of-the-tests"
NOW = 1_700_000_000
IDS = st.from_regex(r"[A-Za-z0-9._-]{1,40}", fullmatch=True)
KEYS = st.binary(min_size=16, max_size=64)


def standard_headers(delivery: str, timestamp: int, body: bytes, *keys: bytes) -> dict[str, str]:
    return {
        "webhook-id": delivery,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(sign_standard(key, delivery, timestamp, body) for key in keys),
    }


def passes(headers: dict[str, str], body: bytes, *keys: bytes, now: float = NOW) -> bool:
    try:
        verify_standard(keys, headers, body, now=now, tolerance_s=300)
    except Refused as refused:
        return refused.status != 401  # whoever is not known gets no other answer
    return True


def test_github_signs_as_its_documentation_shows() -> None:
    """The secret, body and signature that GitHub documents for checking an implementation."""
    signature = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert sign_github(b"It's a Secret to Everybody", b"Hello, World!") == signature
    verify_github([b"It's a Secret to Everybody"], {"x-hub-signature-256": signature}, b"Hello, World!")


def test_standard_webhooks_signs_as_its_specification_shows() -> None:
    """The example of the specification's reference implementations."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign_standard(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@settings(deadline=None)
@given(KEYS, IDS, st.integers(NOW - 300, NOW + 300), st.binary(max_size=200))
def test_what_is_signed_passes(key: bytes, delivery: str, timestamp: int, body: bytes) -> None:
    headers = standard_headers(delivery, timestamp, body, key)
    assert verify_standard([b"another key of 16", key], headers, body, now=NOW, tolerance_s=300) == delivery


@settings(deadline=None)
@given(st.data(), IDS, st.integers(NOW - 300, NOW + 300), st.binary(max_size=200))
def test_a_tampered_part_never_passes(data: st.DataObject, delivery: str, timestamp: int, body: bytes) -> None:
    headers = standard_headers(delivery, timestamp, body, KEY)
    match data.draw(st.sampled_from(["body", "id", "timestamp", "signature", "key"])):
        case "body":
            other = data.draw(st.binary(max_size=200))
            assume(other != body)
            assert not passes(headers, other, KEY)
        case "id":
            headers["webhook-id"] = data.draw(IDS.filter(lambda other: other != delivery))
            assert not passes(headers, body, KEY)
        case "timestamp":
            other = data.draw(st.integers(NOW - 300, NOW + 300).filter(lambda other: other != timestamp))
            headers["webhook-timestamp"] = str(other)
            assert not passes(headers, body, KEY)
        case "signature":
            text = headers["webhook-signature"]
            place = data.draw(st.integers(3, len(text) - 3))  # the last character's lower bits are padding
            letter = data.draw(st.sampled_from("ABCabc012+/é\ud800").filter(lambda other: other != text[place]))
            headers["webhook-signature"] = text[:place] + letter + text[place + 1 :]
            assert not passes(headers, body, KEY)
        case "key":
            assert not passes(headers, body, data.draw(KEYS.filter(lambda other: other != KEY)))


@settings(deadline=None)
@given(st.binary(max_size=100), st.binary(max_size=100), st.sampled_from([KEY, b"another key of 16"]))
def test_github_passes_only_this_body_under_this_key(signed: bytes, sent: bytes, key: bytes) -> None:
    headers = {"x-hub-signature-256": sign_github(key, signed)}
    if signed == sent and key == KEY:
        verify_github([KEY], headers, sent)
    else:
        with pytest.raises(Refused, match="does not fit"):
            verify_github([KEY], headers, sent)


def test_the_parts_can_not_be_moved_over_their_borders() -> None:
    """`id.timestamp.body`: no other split of the same bytes has the same signature and passes."""
    headers = standard_headers("a", NOW, b"1.x", KEY)
    assert not passes({**headers, "webhook-id": f"a.{NOW}", "webhook-timestamp": "1"}, b"x", KEY)


@pytest.mark.parametrize(("age_s", "is_taken"), [(0, True), (300, True), (301, False), (-300, True), (-301, False)])
def test_the_replay_window_has_two_ends(age_s: int, is_taken: bool) -> None:
    headers = standard_headers("a", NOW - age_s, b"{}", KEY)
    assert passes(headers, b"{}", KEY) is is_taken


def test_one_right_signature_of_several_is_enough_while_a_key_changes() -> None:
    headers = standard_headers("a", NOW, b"{}", b"the new key of 16 or more", KEY)
    assert passes(headers, b"{}", KEY)
    assert passes(headers, b"{}", b"yet another key of 16", KEY)
    assert not passes(headers, b"{}", b"yet another key of 16")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"webhook-id": ""}, "Not signed"),
        ({"webhook-timestamp": ""}, "Not signed"),
        ({"webhook-signature": ""}, "Not signed"),
        ({"webhook-timestamp": "now"}, "not a time"),
        ({"webhook-timestamp": "-5"}, "not a time"),
        ({"webhook-timestamp": "1e9"}, "not a time"),
        ({"webhook-timestamp": "١٢٣"}, "not a time"),
        ({"webhook-timestamp": "1" * 400}, "not a time"),
        ({"webhook-timestamp": f"0{NOW}"}, "leading zeros"),
        ({"webhook-signature": "v1a,abc"}, "has 0 signatures"),
        ({"webhook-signature": "v1,abc " * 9}, "has 9 signatures"),
        ({"webhook-signature": "v1,"}, "does not fit"),
    ],
)
def test_headers_of_another_form_are_refused_with_a_reason(change: dict[str, str], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        verify_standard([KEY], {**standard_headers("a", NOW, b"{}", KEY), **change}, b"{}", now=NOW, tolerance_s=300)


@pytest.mark.parametrize(
    ("value", "is_taken"),
    [
        ("Bearer a-secret-of-the-tests", True),
        ("bearer  a-secret-of-the-tests", True),
        ("Bearer a-secret-of-the-test", False),
        ("Bearer a-secret-of-the-testsx", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("Basic a-secret-of-the-tests", False),
        ("a-secret-of-the-tests", False),
        ("Bearer é", False),
        ("", False),
    ],
)
def test_a_bearer_token_is_the_secret(value: str, is_taken: bool) -> None:
    if is_taken:
        verify_bearer([b"another", KEY], {"authorization": value})
    else:
        with pytest.raises(Refused, match="oken"):
            verify_bearer([b"another", KEY], {"authorization": value})


def test_secrets_are_compared_in_constant_time_only() -> None:
    """No == or != between what was given and what is expected: each comparison goes through hmac.compare_digest."""
    tree = ast.parse(Path(inspect.getfile(signatures)).read_text())
    functions = {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "compare_digest" in functions["is_equal"]
    assert "is_equal" in functions["verify_standard"]
    assert "is_equal" in functions["verify_github"]
    assert "compare_digest" in functions["verify_bearer"]
    for name in ("verify_standard", "verify_github", "is_equal"):
        assert "==" not in functions[name].split('"""')[-1]
