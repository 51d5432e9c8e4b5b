import pytest
from typer.testing import CliRunner

from medssl_cli.app import COMMANDS, app


def invoke(*words: str) -> tuple[int, str, str]:
    answer = CliRunner().invoke(app, list(words))
    return answer.exit_code, answer.stdout, answer.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nonsense"], "nonsense"),
        (["phantom", "prostate"], "out"),
        (["phantom", "prostate", "out", "--cases", "abc"], "--cases"),
        (["pretrain", "--bogus"], "--bogus"),
        (["infer", "case", "--top-k", "0"], "--top-k"),
        (["convert", "align", "a", "b"], "--reference"),
    ],
)
def test_wrong_words_end_in_three_lines_and_exit_2(words: list[str], named: str) -> None:
    code, stdout, stderr = invoke(*words)
    assert code == 2
    assert not stdout
    what, where, fix = stderr.strip().splitlines()
    assert what.startswith("error: ")
    assert named in what
    assert where.startswith("  where: ")
    assert fix.endswith("--help`")


def test_no_words_show_the_help() -> None:
    _, stdout, stderr = invoke()
    assert "pretrain" in stdout + stderr


def test_help_lists_the_commands_in_order_and_whole() -> None:
    code, stdout, _ = invoke("--help")
    assert code == 0
    listing = stdout.split("Commands:")[1]
    places = [listing.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert "…" not in listing
    assert "..." not in listing


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert invoke("--version")[:2] == (0, f"medssl {version('medssl')}\n")


def test_a_traceback_comes_only_with_verbose(tmp_path: object) -> None:
    words = ("split", f"{tmp_path}/absent", "--out", f"{tmp_path}/split")
    assert "Traceback" not in invoke(*words)[2]
    code, _, stderr = invoke("--verbose", *words)
    assert code == 3
    assert "Traceback" in stderr
