"""What counts as a secret, and that it goes out of texts and off streams."""

import io
import sys

import pytest

from cluster import redact as module
from cluster.logs import last_lines
from cluster.redact import RedactedStream, guard_output, is_secret_name, redact, redacted, restore_output, secrets_in


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch, tmp_path) -> dict[str, str]:
    """Planted in the environment; by the name of the variable that has to be shown instead, where one has."""
    file = tmp_path / "token"
    file.write_text("0123abcd" * 8 + "\n")
    planted = {
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCY",
        "HF_TOKEN": "planted-hf-token",
        "FSSPEC_S3": '{"key": "x", "secret": "planted-in-json"}',
        "DATABASE_URL": "postgres://me:planted-password@db/x",
        "RAY_AUTH_TOKEN_PATH": str(file),
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    return {
        "AWS_SECRET_ACCESS_KEY": planted["AWS_SECRET_ACCESS_KEY"], "HF_TOKEN": "planted-hf-token",
        "FSSPEC_S3": "planted-in-json", "DATABASE_URL": "planted-password", "RAY_AUTH_TOKEN_PATH": "0123abcd" * 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("AWS_SECRET_ACCESS_KEY", True), ("HF_TOKEN", True), ("WANDB_API_KEY", True), ("MY-PASSWORD", True),
        ("AZURE_STORAGE_CONNECTION_STRING", True), ("AZURE_STORAGE_SAS_TOKEN", True), ("GH_PAT", True),
        ("TOKENIZERS_PARALLELISM", False), ("RAY_AUTH_MODE", False), ("RAY_AUTH_TOKEN_PATH", False),
        ("SSH_AUTH_SOCK", False), ("HOME", False), ("KEYBOARD", False), ("PATH", False),
    ],
)  # fmt: skip
def test_names(name: str, secret: bool) -> None:
    assert is_secret_name(name) == secret


def test_values_of_the_environment_go_in_every_form(secrets: dict[str, str]) -> None:
    for name, value in secrets.items():
        assert redact(f"denied for {value}!") == f"denied for ***{name}***!"
    assert "wJalr" not in redact("https://host/x?a=wJalrXUtnFEMI%2FK7MDENG%2BbPxRfiCY")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:word@host/x", "https://***@host/x"),
        ("s3://key:secret-word@bucket/x and s3://a:b@c", "s3://***@bucket/x and s3://***@c"),
        ("https://token@host/x", "https://***@host/x"),
        ("GET https://h/x?X-Amz-Signature=abc&part=2", "GET https://h/x?X-Amz-Signature=***&part=2"),
        ("https://a.blob/x?sv=1&sig=ab%2Bc", "https://a.blob/x?sv=1&sig=***"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("client(secret_key='abcdefghi', x=1)", "client(secret_key='***', x=1)"),
        ('{"password": "abcdefghi"}', '{"password": "***"}'),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
    ],
)
def test_forms(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "abfs://container@account.dfs.core.windows.net/x", "s3://bucket/folder", "tokens = 12345678, key.path=value",
        "model.vocab_size = 257 is smaller than the 4,096 tokens", "tcp://127.0.0.1:15000", "the secret of it",
        "launch/jobs/ray_cluster.sh token", "runs/debug@2", "user@host:/path", "http://127.0.0.1:8265",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_short_values_paths_and_numbers_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("A_TOKEN", "debug"), ("B_KEY", "/home/me/key.pem"), ("C_PASSWORD", "12345678")):
        monkeypatch.setenv(name, value)
    assert redact("debug /home/me/key.pem 12345678") == "debug /home/me/key.pem 12345678"


def test_nested_values_and_where_they_lie(secrets: dict[str, str]) -> None:
    config = {"data": {"path": "https://a:b@c/d", "seed": 1}, "list": ["x", "planted-hf-token"], "n": None}
    assert secrets_in(config) == ["data.path", "list[1]"]
    assert redacted(config) == {
        "data": {"path": "https://***@c/d", "seed": 1}, "list": ["x", "***HF_TOKEN***"], "n": None,
    }  # fmt: skip
    assert secrets_in(redacted(config)) == []


def test_a_secret_in_two_pieces_does_not_get_through(secrets: dict[str, str]) -> None:
    below = io.StringIO()
    stream = RedactedStream(below)
    assert stream.write("a planted-hf") == 12 and below.getvalue() == ""
    stream.write("-token\nrest")
    assert below.getvalue() == "a ***HF_TOKEN***\n"
    stream.flush()
    assert below.getvalue().endswith("rest")
    stream.write("50 %\r")
    assert below.getvalue().endswith("50 %\r")


def test_the_output_of_this_process_is_guarded_once(
    secrets: dict[str, str], capsys: pytest.CaptureFixture, tmp_path
) -> None:
    before = sys.stdout, sys.stderr
    guard_output()
    guard_output()
    try:
        assert isinstance(sys.stdout, RedactedStream) and not isinstance(sys.stdout._stream, RedactedStream)
        print("out planted-hf-token")
        print("error planted-hf-token", file=sys.stderr)
    finally:
        restore_output()
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("out ***HF_TOKEN***\n", "error ***HF_TOKEN***\n")
    (tmp_path / "log").write_text("native code printed planted-hf-token\n")
    assert last_lines(tmp_path / "log") == "native code printed ***HF_TOKEN***"


def test_a_new_value_of_a_variable_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEW_TOKEN", "first-value")
    assert redact("first-value") == "***NEW_TOKEN***"
    monkeypatch.setenv("NEW_TOKEN", "second-value")
    assert redact("first-value second-value") == "first-value ***NEW_TOKEN***"
    assert module.MASK not in redact("first-value")
