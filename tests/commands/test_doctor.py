import json

from typer.testing import CliRunner

from medssl_cli.app import app


def test_json_is_one_document() -> None:
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    assert answer.exit_code == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["command"] == "doctor"
    assert {"schema_version", "medssl_version", "started_at", "elapsed_s"} <= set(document)
    assert document["disk"][0]["free_bytes"] > 0


def test_text_names_versions_and_advice() -> None:
    answer = CliRunner().invoke(app, ["doctor"])
    assert answer.exit_code == 0
    assert "torch" in answer.stdout
    assert "Known symptoms" in answer.stdout
