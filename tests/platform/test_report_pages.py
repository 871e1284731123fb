"""Reports in the store as pages of Prefect's server, behind the same password."""

from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from flows.platform.report_pages import ReportPages
from vectorclm.store.artifact import Store

PAGE, TEXT = f"/reports/{'a' * 64}.html", "<h1>The report of übung</h1>"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "store"))
    store.write(PAGE[1:], TEXT.encode())
    store.write("reports/notes.html", b"secret")
    store.write(f"locks/{'a' * 64}.html", b"secret")
    return store


def served(store: Store, password: str | None) -> TestClient:
    return TestClient(ReportPages(PlainTextResponse("Prefect"), store, password))


def test_a_report_needs_the_user_and_the_password(store: Store) -> None:
    client = served(store, "admin:pass:wörd")
    for wrong in (None, ("admin", "pass"), ("other", "pass:wörd"), ("admin", "")):
        refused = client.get(PAGE, auth=wrong)
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic realm=")
    assert client.get(PAGE, headers={"Authorization": "Bearer admin:pass:wörd".encode()}).status_code == 401
    assert client.get(f"/reports/{'b' * 64}.html").status_code == 401  # nor does it say which reports there are
    found = client.get(PAGE, auth=("admin", "pass:wörd"))
    assert (found.status_code, found.text) == (200, TEXT)
    assert found.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in found.headers["content-security-policy"]


def test_without_a_password_reports_are_open_and_nothing_else_is_read(store: Store) -> None:
    client = served(store, None)
    assert client.get(PAGE).text == TEXT and client.head(PAGE).status_code == 200
    assert client.get("/runs").text == "Prefect" and client.get("/reports").text == "Prefect"
    places = ["", "notes.html", f"{'b' * 64}.html", f"..%2Flocks%2F{'a' * 64}.html", f"%2e%2e/locks/{'a' * 64}.html"]
    for place in places:
        found = client.get(f"/reports/{place}")
        assert "secret" not in found.text and found.status_code in (200, 404)
        assert found.status_code == 404 or found.text == "Prefect"
    assert client.post(PAGE).status_code == 405


def test_a_store_that_is_away_is_said(store: Store) -> None:
    page = Path(store.root, PAGE[1:])
    page.unlink()
    page.mkdir()
    found = served(store, None).get(PAGE)
    assert found.status_code == 503 and found.text.startswith("the store does not answer: ")
