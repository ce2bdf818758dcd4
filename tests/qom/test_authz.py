# SPDX-License-Identifier: LGPL-2.1-or-later
"""authz-listfile, which QEMU has but cannot make; the other authz objects are in the
transcripts.
"""

from pathlib import Path

import pytest

from tests.support.qmp import Client


def add(qmp: Client, path: object, **more: object) -> dict:
    return qmp.cmd(
        "object-add", {"qom-type": "authz-listfile", "id": "f", "filename": str(path), **more}
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting a JSON value"),
        (" \n", "Expecting a JSON value"),
        ("[]", "File '$file' must contain a JSON object"),
        ("7", "File '$file' must contain a JSON object"),
        ("nope", "JSON parse error, invalid keyword '…'"),
        ("{", "JSON parse error, premature EOI"),
        ("{'a", "JSON parse error, stray '…'"),
        ("{} {}", "Expecting at most one JSON value"),
        ("{'policy': 'x'}", "Parameter 'policy' does not accept value 'x'"),
        ("{'policy': null}", "Invalid parameter type for 'policy', expected: string"),
        ("{'rules': 3}", "Invalid parameter type for 'rules', expected: array"),
        ("{'rules': [{'match': 'x'}]}", "Parameter 'rules[0].policy' is missing"),
        ("{'nope': 3}", "Property 'authz-list.nope' not found"),
        ("{'id': 'x'}", "Property 'authz-list.id' not found"),
    ],
)
def test_a_bad_file_is_named_in_qemus_words(
    qmp: Client, tmp_path: Path, content: str, words: str
) -> None:
    """Those of authz/listfile.c, and of the list that it holds."""
    file = tmp_path / "list.json"
    file.write_text(content)
    reply = add(qmp, file)
    assert reply["error"]["desc"] == words.replace("$file", str(file))
    assert "not found" in qmp.fail("object-del", {"id": "f"})


def test_a_good_file_makes_an_object(qmp: Client, tmp_path: Path) -> None:
    """With the properties of QEMU's; its type has another name than in object-add."""
    file = tmp_path / "list.json"
    file.write_text('{"policy": "deny", "rules": [{"match": "fred", "policy": "allow"}]}')
    assert add(qmp, file, refresh=False) == {"return": {}}
    assert qmp.ok("qom-get", {"path": "f", "property": "filename"}) == str(file)
    assert qmp.ok("qom-get", {"path": "f", "property": "refresh"}) is False
    assert qmp.ok("qom-set", {"path": "f", "property": "refresh", "value": True}) == {}
    assert qmp.ok("qom-get", {"path": "f", "property": "refresh"}) is True
    assert qmp.ok("qom-list", {"path": "/objects"})[1] == {
        "name": "f",
        "type": "child<authz-list-file>",
    }
    assert [p["name"] for p in qmp.ok("qom-list", {"path": "f"})] == ["type", "filename", "refresh"]
    assert qmp.fail("object-add", {"qom-type": "secret", "id": "s", "keyid": "f", "data": "x"}) == (
        "Object with id 'f' is not a secret"
    )
    assert qmp.ok("object-del", {"id": "f"}) == {}


def test_a_file_that_is_watched_needs_a_directory(
    qmp: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that cannot be read is named with quotes, unlike a secret's."""
    assert add(qmp, f"{tmp_path}/nope")["error"]["desc"] == (
        f"Unable to read '{tmp_path}/nope': Failed to open file “{tmp_path}/nope”: "
        "No such file or directory"
    )
    assert "Is a directory" in add(qmp, tmp_path)["error"]["desc"]
    (tmp_path / "list.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in ("list.json", "./list.json"):
        assert add(qmp, name)["error"]["desc"] == "Filename must be an absolute path"
    assert add(qmp, "list.json", refresh=False) == {"return": {}}
