"""Secrets in a URL: whether there are any, how it is shown without them, and how it is told from another one without them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

# Up to the last @ before the path: a password may hold an @ and spaces. One with a / in it shows by a port that is none.
_USERINFO = re.compile(r"(?<=://)(?:[^/\n]+|[^/@:\[\s]*:(?!:|\d*(?:/|$))[^@\n]*)@")
_PARAMETER = re.compile(r"([?&;#])([^=&;?#/\s]+)=([^&\s]*)")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Of a parameter's name, by whole words: ?author=, ?keyword= and ?design= are no secrets.
_SECRET_WORD = re.compile(
    r"key|sig|auth|code|pass|passw|pwd|pw|jwt|sas|authorization|.*(?:token|secret|password|passwd|passphrase|credentials?"
    r"|signature|apikey|accesskey)"
)
# By the parameter that signs a URL (S3, Google, Azure; S3 of old, CloudFront): what each new signature changes with it.
_SIGNED_WITH = {
    "x-amz-signature": {"x-amz-date", "x-amz-expires", "x-amz-credential", "x-amz-security-token"},
    "x-goog-signature": {"x-goog-date", "x-goog-expires", "x-goog-credential"},
    "sig": {"se", "st", "ske", "skt"},
    "signature": {"expires", "awsaccesskeyid", "googleaccessid", "policy", "key-pair-id", "x-amz-security-token"},
}


def has_password(uri: str) -> bool:
    """Whether a link of the chain has `user:password@` in it."""
    found = (_USERINFO.search(link) for link in uri.split("::"))
    return any(userinfo[0][:-1].partition(":")[2] for userinfo in found if userinfo)


def has_secret_parameter(uri: str) -> bool:
    """Whether it is a URL with a signature, a token or the like among its parameters: what hide_secrets blanks there."""
    return "://" in uri and _replace_secrets(uri, lambda _: "***") != uri


def remove_secrets(link: str) -> str:
    """One link of a chain, for the key of its documents: equal for whoever asks and whenever it was signed, but for no other.

    A password goes; a bare `name@` stays, since it may be a container (abfs://container@account). A signature goes with
    what comes with it (its date, expiry and credential), and so do they only where there is one. Any other parameter that
    hide_secrets blanks becomes a short hash of its value: two URLs that differ only there are two sources.
    """
    address, question, query = _USERINFO.sub(_drop_password, link).partition("?")
    parts = [(part.partition("=")[0].lower(), part) for part in query.split("&")]
    signed = {name for name, _ in parts} & _SIGNED_WITH.keys()
    dropped = signed.union(*(_SIGNED_WITH[name] for name in signed))
    if signed:
        query = "&".join(part for name, part in parts if name not in dropped)
        question = "?" if query else ""
    return _replace_secrets(f"{address}{question}{query}", _hash)


def hide_secrets(text: str) -> str:
    """The text with user:password@ and the values of signature-like URL parameters blanked."""
    return _replace_secrets(_USERINFO.sub("***@", text), lambda _: "***")


def _drop_password(userinfo: re.Match[str]) -> str:
    name = userinfo[0][:-1].partition(":")[0]
    return f"{name}@" if name else ""


def _replace_secrets(text: str, replace: Callable[[str], str]) -> str:
    def replace_one(match: re.Match[str]) -> str:
        sign, name, value = match.groups()
        # What is no secret may hold a parameter that is one: page=1;token=x
        new = replace(value) if value and _is_secret(name) else _replace_secrets(value, replace)
        return f"{sign}{name}={new}"

    return _PARAMETER.sub(replace_one, text)


def _is_secret(name: str) -> bool:
    return any(_SECRET_WORD.fullmatch(word.lower()) for word in _WORD.findall(name))


def _hash(value: str) -> str:
    return f"sha256-{hashlib.sha256(value.encode(errors='backslashreplace')).hexdigest()[:8]}"
