"""SUBMIT: ends the execution with the output fields."""

from __future__ import annotations

import inspect
import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from broker.protocol import frames, limits
from broker.protocol.messages import OutputField, ToolParameter
from broker.protocol.values import Encoder, ValueNotSendable
from broker.worker import field_types
from broker.worker.current import Current, Execution, Submission
from broker.worker.display import safe_str, type_name
from broker.worker.signatures import make_check, make_signature
from broker.worker.unwinding import ExecutionSubmitted, Unwinding, signal_main_thread

_FRAME_MARGIN_BYTES = 64 << 10
_FRAME_MARGIN_CONTAINERS = 100
_DOC = "End this execution and hand over the final output{fields}. Nothing after this call runs."


class Submit:
    """What stands behind the function SUBMIT of one session.

    Args:
        current: What runs now.
        on_submit: Called once a submission holds, to cut off output and waiting threads.
    """

    def __init__(self, current: Current, on_submit: Callable[[], None]) -> None:
        self._current = current
        self._on_submit = on_submit
        # Guards Execution.submission: the first one holds.
        self._lock = threading.Lock()
        self._fields: tuple[OutputField, ...] = ()
        self._check: Callable[..., None] | None = None
        self.function = self._make_function()
        self.set_fields(())

    def set_fields(self, fields: Sequence[OutputField]) -> None:
        """Set the output fields from now on; none means any."""
        self._fields = tuple(fields)
        if fields:
            parameters = [ToolParameter(name=f.name, kind="positional_or_keyword", annotation=f.type) for f in fields]
            signature = make_signature(parameters)
            self._check = make_check("SUBMIT", signature)
            named = f": {', '.join(field.name for field in fields)}"
        else:
            output = ToolParameter(name="output", kind="positional_only", default="...")
            signature = make_signature([output, ToolParameter(name="fields", kind="var_keyword")])
            self._check, named = None, ", one value or any keywords"
        self.function.__signature__ = signature
        self.function.__doc__ = _DOC.format(fields=named)

    def _make_function(self) -> Any:
        submit = self

        def SUBMIT(*args: Any, **kwargs: Any) -> None:
            submit._submit(sys._getframe(1), args, kwargs)

        SUBMIT.__qualname__, SUBMIT.__module__ = "SUBMIT", "__main__"
        return SUBMIT

    def _submit(self, caller: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._current.in_child:
            raise RuntimeError("SUBMIT works in the session's own process, not in one forked off it; return the value")
        execution = self._current.require("SUBMIT")
        if execution.submission is None:
            submission = self._encode(self._by_name(args, kwargs))
            with self._lock:
                if execution.submission is None:
                    execution.submission = submission
            self._on_submit()
        self._leave(execution, caller)

    def _leave(self, execution: Execution, caller: Any) -> None:
        """Unwind the calling thread, and the main thread where that is another one."""
        unwinding = Unwinding(ExecutionSubmitted)
        if threading.current_thread() is threading.main_thread():
            if execution.unwinding is not None:
                execution.unwinding.stop()
            execution.unwinding = unwinding
        else:
            signal_main_thread()
        unwinding.start(caller)
        raise ExecutionSubmitted

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._check is None:
            return _free_form(args, kwargs)
        try:
            self._check(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{error}; expected {self._usage()}") from None
        given = {**{field.name: value for field, value in zip(self._fields, args, strict=False)}, **kwargs}
        for field in self._fields:
            if not field_types.fits(given[field.name], field.type):
                got = type_name(type(given[field.name]))
                raise TypeError(
                    f"SUBMIT() field {field.name!r} must be {field.type}, got {got}; expected {self._usage()}"
                )
        return {field.name: given[field.name] for field in self._fields}

    def _usage(self) -> str:
        return f"SUBMIT{inspect.signature(self.function)}"

    def _encode(self, output: dict[str, Any]) -> Submission:
        encoder = Encoder(listify=True, lazy=True)
        try:
            value = {name: encoder.encode(item, f"SUBMIT() field {name!r}") for name, item in output.items()}
        except ValueNotSendable as error:
            raise TypeError(str(error)) from None
        except Exception as error:
            raise TypeError(f"SUBMIT() failed to read a value: {type_name(type(error))}: {safe_str(error)}") from error
        # With room for the rest of the frame: a frame that the broker refuses would end the session.
        text = json.dumps(value)
        if frames.containers(text.encode("ascii")) + _FRAME_MARGIN_CONTAINERS > limits.MAX_JSON_CONTAINERS:
            raise TypeError(f"SUBMIT() was given more than {limits.MAX_JSON_CONTAINERS:,} lists and dicts; send text")
        head = len(text) + _FRAME_MARGIN_BYTES
        size = head + sum(map(len, encoder.blobs))
        if head > limits.MAX_HEADER_BYTES or size > limits.MAX_TOOL_CALL_BYTES:
            raise TypeError(f"SUBMIT() was given {size:,} bytes; at most {limits.MAX_TOOL_CALL_BYTES:,} can be sent")
        return Submission(value, encoder.blobs)


def _free_form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) == 1 and not kwargs:
        return {"output": args[0]}
    if kwargs and not args:
        return kwargs
    raise TypeError(
        f"SUBMIT() takes one value or only keywords, got {len(args)} positional and {len(kwargs)} keyword arguments"
    )
