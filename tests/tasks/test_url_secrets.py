"""What a URL may show, and what of it tells one source from another."""

from __future__ import annotations

import pytest

from tasks.url_secrets import has_secret_parameter, hide_secrets, remove_secrets


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("ftp://user:p@ss@host/x", "ftp://***@host/x"),
        ("ftp://user:p w@host/x", "ftp://***@host/x"),
        ("ftp://user:p/w@host/x", "ftp://***@host/x"),
        ("zip://*.md::ftp://user:pw@host/x.zip", "zip://*.md::ftp://***@host/x.zip"),
        ("https://host/a?code=x&page=1", "https://host/a?code=***&page=1"),
        ("https://host/a?page=1;token=x", "https://host/a?page=1;token=***"),
        (
            "https://host/a?apiKey=x&api_key=x&AWSAccessKeyId=x",
            "https://host/a?apiKey=***&api_key=***&AWSAccessKeyId=***",
        ),
        (
            "https://host/a?X-Amz-Security-Token=x&client.secret=x",
            "https://host/a?X-Amz-Security-Token=***&client.secret=***",
        ),
        ("403 of 'https://host/a?sig=x' (x@y)", "403 of 'https://host/a?sig=*** (x@y)"),
        # no secrets
        ("https://host:80/x@y?author=a&keyword=b&design=c", "https://host:80/x@y?author=a&keyword=b&design=c"),
        ("zip://*.md::/docs/a@b.zip", "zip://*.md::/docs/a@b.zip"),
        ("s3://bucket/page-?.md", "s3://bucket/page-?.md"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(uri: str, shown: str) -> None:
    assert hide_secrets(uri) == shown


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("abfs://one@acct.dfs.core.windows.net/docs", "abfs://two@acct.dfs.core.windows.net/docs"),
        ("https://host/?author=alice", "https://host/?author=bob"),
        ("https://host/?keyword=a&design=b", "https://host/?keyword=a&design=c"),
        ("https://host/?token=a", "https://host/?token=b"),
        ("https://host/?a=1;key=a", "https://host/?a=1;key=b"),
        ("https://host/?se=1&expires=1", "https://host/?se=2&expires=1"),  # not signed: nobody knows what it means
        ("https://host/a?sig=1", "https://host/b?sig=1"),
        ("https://host/a?v=1&sig=1", "https://host/a?v=2&sig=1"),
    ],
)
def test_two_sources_never_share_a_key(one: str, other: str) -> None:
    assert remove_secrets(one) != remove_secrets(other)


@pytest.mark.parametrize(
    ("uri", "link"),
    [
        ("ftp://user:p@ss@host/x", "ftp://user@host/x"),
        ("ftp://:pass@host/x", "ftp://host/x"),
        ("s3://bucket/page-?.md", "s3://bucket/page-?.md"),
        ("https://host/a?X-Amz-Date=1&v=3&X-Amz-Credential=2&X-Amz-Security-Token=3&X-Amz-Expires=4&X-Amz-Signature=5",
         "https://host/a?v=3"),
        ("https://acct.blob.core.windows.net/c/x?sv=1&st=2&se=3&sig=4", "https://acct.blob.core.windows.net/c/x?sv=1"),
        ("https://host/a?AWSAccessKeyId=1&Expires=2&Signature=3", "https://host/a"),
    ],
)  # fmt: skip
def test_a_key_is_the_same_whoever_asks_and_whenever_it_was_signed(uri: str, link: str) -> None:
    assert remove_secrets(uri) == link


def test_a_key_shows_no_secret() -> None:
    found = remove_secrets("https://host/a?token=hunter2&x=1;password=hunter2&code=hunter2&y=1#key=hunter2")
    assert "hunter2" not in found
    assert found.count("sha256-") == 4


@pytest.mark.parametrize("parameter", ["X-Amz-Signature", "sig", "Signature", "token"])
def test_a_signed_url_is_known_by_its_parameters(parameter: str) -> None:
    assert has_secret_parameter(f"https://host/a?page=1&{parameter}=x")
    assert not has_secret_parameter(f"https://host/a?page=1&un{parameter}ed=x")
    assert not has_secret_parameter(f"docs/page?{parameter}=x"), "a glob"
