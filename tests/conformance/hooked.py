"""What the tests of hooks share: an interpreter that is fast because it is none, and a way to call an RLM."""

from __future__ import annotations

import asyncio
import contextlib
import io
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from dspy.primitives.code_interpreter import FinalOutput

from host_client.dspy_compat import contract


class Local:
    """Runs code in this process and notes it; errors are what DSPy's own interpreters raise."""

    def __init__(self, tools: dict[str, Any] | None = None, output_fields: Any = None) -> None:
        self.tools: dict[str, Any] = dict(tools or {})
        self.output_fields = output_fields
        self.codes: list[str] = []
        self.inputs: list[dict[str, Any]] = []
        self.space: dict[str, Any] = {}
        self.submitted: FinalOutput | None = None

    def start(self) -> None: ...

    def shutdown(self) -> None: ...

    def execute(self, code: str, variables: dict[str, Any] | None = None) -> Any:
        self._note(code, variables or {})
        names = [field["name"] for field in self.output_fields or []]
        self.space.update(self.tools, SUBMIT=lambda *a, **k: self._submit({**dict(zip(names, a, strict=False)), **k}))
        self.space.update(variables or {})
        self.submitted = None
        out = io.StringIO()
        compiled = compile(code, "<code>", "exec")
        try:
            with contextlib.redirect_stdout(out):
                exec(compiled, self.space)
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            raise contract().code_error(f"{type(error).__name__}: {error} (line {line})") from error
        return self.submitted or out.getvalue()

    def _note(self, code: str, variables: dict[str, Any]) -> None:
        if "__dspy_host_token" not in variables:  # DSPy's own
            self.codes.append(code)
            self.inputs.append(dict(variables))

    def _submit(self, fields: dict[str, Any]) -> None:
        self.submitted = FinalOutput(fields)


class LocalFactory:
    """Makes these and keeps them."""

    def __init__(self) -> None:
        self.made: list[Local] = []

    def __call__(self) -> Local:
        self.made.append(Local())
        return self.made[-1]

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalFactory:
        return self

    @property
    def codes(self) -> list[str]:
        return [code for interpreter in self.made for code in interpreter.codes]


Ask = Callable[..., Any]


def plainly(program: Any, **inputs: Any) -> Any:
    return program(**inputs)


def awaited(program: Any, **inputs: Any) -> Any:
    return asyncio.run(program.acall(**inputs))


both_ways = pytest.mark.parametrize("ask", [plainly, awaited])
