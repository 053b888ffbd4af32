"""Which model plays the demo: a real one if there is a key, else the scripted one. Keys are never shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from host_client.env_file import read_env_file

#: Looked for in this order; the model is a cheap one that writes good Python.
DEFAULT_MODELS = {
    "OPENAI_API_KEY": "openai/gpt-5-mini",
    "ANTHROPIC_API_KEY": "anthropic/claude-sonnet-4-5",
    "OPENROUTER_API_KEY": "openrouter/google/gemini-3-flash-preview",
    "GEMINI_API_KEY": "gemini/gemini-3-flash-preview",
}

#: Names that choose the model, the first one wins; the last two go with ``DSPY_LM_MODEL``.
MODEL_NAMES = ("RLM_SANDBOX_DEMO_MODEL", "DSPY_LM_MODEL")
KEY_NAME, BASE_NAME = "DSPY_LLM_API_KEY", "DSPY_LM_API_BASE"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """A real model to use.

    Attributes:
        model: As ``dspy.LM`` takes it, such as ``openai/gpt-5-mini``.
        api_key: Not part of ``repr``.
        api_base: URL of a compatible server, or None for the provider's own.
        found_in: Name of the variable that held the key, for display.
    """

    model: str
    api_key: str = dataclasses.field(repr=False)
    api_base: str | None
    found_in: str

    def redact(self, text: str) -> str:
        """Return text without the key, should an error message quote it."""
        return text.replace(self.api_key, "***") if self.api_key else text


def choose_model(environ: Mapping[str, str], env_file: Path | None = None) -> ModelChoice | None:
    """Return the model to use, or None where there is no key.

    Args:
        environ: The environment; it wins over the file.
        env_file: A ``.env`` file, which need not exist. Only the variables named in this module are taken.
    """
    known = {*DEFAULT_MODELS, *MODEL_NAMES, KEY_NAME, BASE_NAME}
    values = read_env_file(env_file) if env_file else {}
    values.update(environ)
    values = {name: value for name, value in values.items() if name in known and value}
    model = next((values[name] for name in MODEL_NAMES if name in values), None)
    if model is not None:
        provider_key = f"{model.partition('/')[0].upper()}_API_KEY"
        key_names = [name for name in (KEY_NAME, provider_key) if name in values]
    else:
        key_names = [name for name in DEFAULT_MODELS if name in values]
    if not key_names:
        return None
    found_in = key_names[0]
    return ModelChoice(
        model=model or DEFAULT_MODELS[found_in],
        api_key=values[found_in],
        api_base=values.get(BASE_NAME) if found_in == KEY_NAME else None,
        found_in=found_in,
    )
