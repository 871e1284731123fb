"""Addresses of stores have one spelling; what would name another place than meant is refused."""

from pathlib import Path

import pytest

from vectorclm.errors import StoreError
from vectorclm.store.address import normalized
from vectorclm.store.artifact import Store


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3:/bucket/p", "write s3://bucket/p$"),
        ("S3:bucket/p", "write s3://bucket/p$"),
        ("gs:/bucket", "write gs://bucket$"),
        ("file:/a/b", "write file:///a/b$"),
        ("s3://bucket//p", "write s3://bucket/p$"),
        ("s3:///bucket/p", "write s3://bucket/p$"),
        ("s3://bucket/./p", "write s3://bucket/p$"),
        ("gs://bucket/a///b", "write gs://bucket/a/b$"),
        ("s3://bucket/a/../b", r"without \.\."),
        ("memory://bucket/..", r"without \.\."),
        ("s3://bucket/a?versionId=1", r"without \? and #"),
        ("s3://bucket/a#b", r"without \? and #"),
        ("store\0x", "control character"),
        ("s3://bucket/\x1b[2J", "control character"),
        ("store\ud800", "half a character"),
    ],
)
def test_a_spelling_that_names_another_place_is_refused(
    address: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=message) as refused:
        Store(address)
    assert str(refused.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spelling",
    ["{}", " {}\n", "{}/", "{}//", "{}/.", "{parent}//{name}", "{parent}/./{name}", "file://{}", "file://{}/"],
)
def test_every_spelling_of_a_folder_finds_what_another_wrote(tmp_path: Path, spelling: str) -> None:
    plain = tmp_path / "a ?b%20"
    Store(str(plain)).write("stage/key", b"x")
    store = Store(spelling.format(plain, parent=plain.parent, name=plain.name))
    assert store.uri == str(plain)
    assert list(store.files("")) == ["stage/key"] and store.read("stage/key") == b"x" and store.list("stage") == ["key"]


def test_remote_addresses_keep_their_bytes_but_for_the_end() -> None:
    assert (
        normalized("s3://bucket/p/")
        == normalized("s3://bucket/p//")
        == normalized(" s3://bucket/p ")
        == "s3://bucket/p"
    )
    assert normalized("s3://bucket/a%20b ü") == "s3://bucket/a%20b ü"
    assert normalized("memory://") == "memory://" and normalized("/") == normalized("//") == "/"
    Store("memory://spellings/p").write("stage/key", b"x")
    assert list(Store("memory://spellings/p/").files("")) == ["stage/key"]
