"""A key chooses the model; it is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from host_client.demo.keys import DEFAULT_MODELS, choose_model
from host_client.env_file import read_env_file


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    return tmp_path / ".env"


def test_without_a_key_there_is_no_model(env_file: Path) -> None:
    assert choose_model({"PATH": "/bin", "DSPY_LM_MODEL": "openai/x", "OPENAI_API_KEY": ""}, env_file) is None


@pytest.mark.parametrize("name", DEFAULT_MODELS)
def test_each_provider_has_a_default_model(name: str) -> None:
    choice = choose_model({name: "secret"})
    assert choice is not None
    assert (choice.model, choice.api_key, choice.found_in, choice.api_base) == (
        DEFAULT_MODELS[name], "secret", name, None,
    )  # fmt: skip


def test_named_model_takes_its_providers_key() -> None:
    environ = {"OPENAI_API_KEY": "o", "ANTHROPIC_API_KEY": "a", "RLM_SANDBOX_DEMO_MODEL": "anthropic/some-model"}
    choice = choose_model(environ)
    assert choice is not None
    assert (choice.model, choice.api_key) == ("anthropic/some-model", "a")


def test_named_model_never_gets_another_providers_key() -> None:
    assert choose_model({"OPENAI_API_KEY": "o", "RLM_SANDBOX_DEMO_MODEL": "anthropic/some-model"}) is None


def test_proxy_takes_its_own_key_and_base() -> None:
    environ = {
        "DSPY_LM_MODEL": "openai/m",
        "DSPY_LLM_API_KEY": "p",
        "DSPY_LM_API_BASE": "http://proxy",
        "OPENAI_API_KEY": "o",
    }
    choice = choose_model(environ)
    assert choice is not None
    assert (choice.api_key, choice.api_base) == ("p", "http://proxy")


def test_providers_own_key_is_never_sent_to_another_base() -> None:
    choice = choose_model({"DSPY_LM_MODEL": "openai/m", "OPENAI_API_KEY": "o", "DSPY_LM_API_BASE": "http://proxy"})
    assert choice is not None
    assert choice.api_base is None


def test_environment_wins_over_the_file(env_file: Path) -> None:
    env_file.write_text("OPENAI_API_KEY=from-file\n")
    for environ, key in (({}, "from-file"), ({"OPENAI_API_KEY": "from-environment"}, "from-environment")):
        choice = choose_model(environ, env_file)
        assert choice is not None
        assert choice.api_key == key


def test_file_is_read_as_dotenv_files_are_written(env_file: Path) -> None:
    env_file.write_text(
        "# a comment\nexport A=1\nB = \"two # words\"\nC='$HOME'\nD=plain # a comment\nE=x=y\nnonsense\n9=9\nF=\n"
    )
    assert read_env_file(env_file) == {
        "A": "1", "B": "two # words", "C": "$HOME", "D": "plain", "E": "x=y", "F": "",
    }  # fmt: skip


def test_file_that_cannot_be_read_is_no_file(tmp_path: Path) -> None:
    assert read_env_file(tmp_path / "absent") == {}
    assert read_env_file(tmp_path) == {}
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert read_env_file(tmp_path / "binary") == {}


def test_key_is_in_no_text_of_the_choice() -> None:
    choice = choose_model({"OPENAI_API_KEY": "sk-very-secret"})
    assert choice is not None
    assert "sk-very-secret" not in f"{choice} {choice!r}"
    assert choice.redact("Incorrect API key: sk-very-secret.") == "Incorrect API key: ***."
