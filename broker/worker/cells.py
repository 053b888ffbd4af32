"""Source text to code objects: the last expression apart, top-level ``await``, source lines for tracebacks."""

from __future__ import annotations
import __future__

import ast
import collections
import contextlib
import dataclasses
import gc
import inspect
import linecache
import re
import types
from typing import Any

#: Tells generated code's files apart from everybody else's.
FILENAME_PREFIX = "<execution "

# Enough for every function that a session still uses; sources of megabytes fall out sooner.
_MAX_SOURCES = 300
_MAX_SOURCE_CHARS = 32 << 20
# Python's syntax tree takes about 600 bytes a token: more tokens than this could use up the sandbox's memory.
MAX_TOKENS = 300_000
_COUNTED_FROM_CHARS = 256 << 10
_TOKEN = re.compile(
    r"#[^\n]*"
    r'|"""(?:[^"\\]|\\.|"(?!""))*"""|\'\'\'(?:[^\'\\]|\\.|\'(?!\'\'))*\'\'\''
    r'|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'|\w+|[^\w\s]',
    re.DOTALL,
)
#: One line without a statement's signs; then there is no need for a syntax tree to find the last expression.
_LOOKS_LIKE_EXPRESSION = re.compile(r"\w[^\n\r\f;#=:\\]*", re.ASCII).fullmatch
_FUTURE_FLAGS = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """Compiled source; both parts may be missing (a source of comments has none)."""

    body: types.CodeType | None
    last: types.CodeType | None

    @property
    def is_async(self) -> bool:
        """Whether it must run on an event loop."""
        body, last = self.body, self.last
        return bool((body and body.co_flags & inspect.CO_COROUTINE) or (last and last.co_flags & inspect.CO_COROUTINE))


def is_generated(code: types.CodeType) -> bool:
    """Tell whether a code object was compiled from generated source."""
    return code.co_filename.startswith(FILENAME_PREFIX)


def compile_cell(source: str, filename: str) -> Cell:
    """Compile generated source.

    Raises:
        SyntaxError: For whatever the compiler objects to, in its own words where it has good ones.
    """
    try:
        _refuse_giant(source)
        return _compile(source, filename)
    except SyntaxError:
        raise
    except UnicodeEncodeError as error:
        line = source.count("\n", 0, error.start) + 1
        surrogate = f"U+{ord(source[error.start]):04X}"
        raise SyntaxError(f"lone surrogate {surrogate} in the source", (filename, line, None, None)) from None
    except (RecursionError, MemoryError):
        raise SyntaxError("the source is nested too deeply to be compiled", (filename, None, None, None)) from None
    except (ValueError, OverflowError) as error:
        at = source.find("\0")
        where = source.count("\n", 0, at) + 1 if at >= 0 else None
        raise SyntaxError(str(error), (filename, where, None, None)) from None


def _refuse_giant(source: str) -> None:
    if len(source) < _COUNTED_FROM_CHARS:
        return
    for count, _ in enumerate(_TOKEN.finditer(source)):
        if count >= MAX_TOKENS:
            raise SyntaxError(f"the source has more than {MAX_TOKENS:,} tokens; pass data as variables, not as code")


def _compile(source: str, filename: str) -> Cell:
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    if _LOOKS_LIKE_EXPRESSION(source):
        with contextlib.suppress(SyntaxError):  # the long way finds the right words for it
            return Cell(None, compile(source, filename, "eval", flags, dont_inherit=True))
    tree = _parse(source, filename, flags)
    statements = tree.body
    if not statements:
        return Cell(None, None)
    if not isinstance(statements[-1], ast.Expr):
        return Cell(compile(tree, filename, "exec", flags, dont_inherit=True), None)
    value = ast.Expression(statements.pop().value)
    body = None
    if statements:
        body = compile(tree, filename, "exec", flags, dont_inherit=True)
        flags |= body.co_flags & _FUTURE_FLAGS
    return Cell(body, compile(value, filename, "eval", flags, dont_inherit=True))


def _parse(source: str, filename: str, flags: int) -> Any:
    """Return the syntax tree, without garbage collection.

    In Python 3.11 (seen in 3.11.7) a collection that runs Python code which builds a tree too, as asyncio's report of
    a failed task does, breaks the one being built: "SystemError: AST constructor recursion depth mismatch".
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return compile(source, filename, "exec", flags | ast.PyCF_ONLY_AST, dont_inherit=True)
    finally:
        if collects:
            gc.enable()


class Sources:
    """Keeps recent sources in ``linecache``, where tracebacks and ``inspect.getsource`` look for them."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._sizes: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._total = 0

    def add(self, filename: str, source: str) -> None:
        """Register a source; the oldest ones go, unless a function in the namespace came from them."""
        # Not splitlines(): a form feed or U+2028 ends no line of Python.
        text = source.replace("\r\n", "\n").replace("\r", "\n") if "\r" in source else source
        lines = [line + "\n" for line in text.split("\n")]
        linecache.cache[filename] = (len(source), None, lines, filename)
        self._sizes[filename] = len(source)
        self._total += len(source)
        if len(self._sizes) > _MAX_SOURCES or self._total > _MAX_SOURCE_CHARS:
            self._evict(keep=filename)

    def _evict(self, keep: str) -> None:
        used = {
            value.__code__.co_filename for value in list(self._namespace.values()) if type(value) is types.FunctionType
        }
        for filename in [name for name in self._sizes if name not in used and name != keep]:
            # A tenth more than needed, so that the scan above is rare.
            if len(self._sizes) <= _MAX_SOURCES * 9 // 10 and self._total <= _MAX_SOURCE_CHARS:
                return
            self._total -= self._sizes.pop(filename)
            linecache.cache.pop(filename, None)
