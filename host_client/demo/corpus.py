"""What the demo's model gets to read, and what is true about it.

The question has an answer that can be checked: which names ``import dspy`` really gives, and which of
them are classes below ``dspy.Module`` or ``Teleprompter``. Only a process with DSPy installed knows.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from host_client.progress import progress

# One line fits a terminal twice over; a paragraph does not.
MAX_LINE_CHARS = 300


def read_source() -> dict[str, str]:
    """Return DSPy's own installed source: path (``dspy/predict/rlm.py``) to text, sorted by path."""
    import dspy

    root = Path(dspy.__file__).parent
    files = sorted(root.rglob("*.py"))
    return {path.relative_to(root.parent).as_posix(): path.read_text(encoding="utf-8") for path in files}


def public_names() -> list[str]:
    """Return the public names that `import dspy` really offers, asked of the live package on the host.

    The source alone does not tell: star imports and lazy attributes decide at run time.
    """
    import dspy

    names = sorted(name for name in dir(dspy) if not name.startswith("_"))
    progress(1.0, f"{len(names)} names in the live package")
    return names


@dataclasses.dataclass(frozen=True, slots=True)
class Truth:
    """The right answer: names of the public modules and optimizers, by introspection."""

    modules: frozenset[str]
    optimizers: frozenset[str]


def inspect_package() -> Truth:
    """Find the public subclasses of ``dspy.Module`` and ``Teleprompter`` (without these two themselves)."""
    import dspy
    from dspy.teleprompt import Teleprompter

    return Truth(_public_below(dspy.Module), _public_below(Teleprompter))


def _public_below(root: type) -> frozenset[str]:
    found = (_public_class(name) for name in public_names())
    return frozenset(cls.__name__ for cls in found if cls is not None and issubclass(cls, root) and cls is not root)


def _public_class(name: str) -> type | None:
    import dspy

    value = getattr(dspy, name, None)
    return value if inspect.isclass(value) and value.__module__.partition(".")[0] == "dspy" else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How an answer compares with the package, for one kind of class.

    Attributes:
        kind: ``modules`` or ``optimizers``.
        right: Names that are there and true.
        missing: True names that the answer lacks.
        wrong: Names in the answer that are not such a class.
        bad_lines: Names whose description is empty, no text, a failed sub-query, more than one line or too long.
    """

    kind: str
    right: frozenset[str]
    missing: frozenset[str]
    wrong: frozenset[str]
    bad_lines: frozenset[str]

    @property
    def precision(self) -> float:
        """Share of the answer's names that are true; 1.0 for an empty answer."""
        answered = len(self.right) + len(self.wrong)
        return len(self.right) / answered if answered else 1.0

    @property
    def recall(self) -> float:
        """Share of the true names that the answer has."""
        true = len(self.right) + len(self.missing)
        return len(self.right) / true if true else 1.0

    @property
    def passed(self) -> bool:
        """Whether the answer is complete, has nothing wrong in it, and describes each name in one line."""
        return not (self.missing or self.wrong or self.bad_lines)


def check_answer(modules: Any, optimizers: Any, truth: Truth) -> tuple[Verdict, Verdict]:
    """Compare an answer (name to one line, twice) with the package."""
    return _check("modules", modules, truth.modules), _check("optimizers", optimizers, truth.optimizers)


def _check(kind: str, answer: Any, true: frozenset[str]) -> Verdict:
    lines = {_real_name(str(name)): line for name, line in answer.items()} if isinstance(answer, dict) else {}
    names = frozenset(lines)
    return Verdict(
        kind=kind,
        right=names & true,
        missing=true - names,
        wrong=names - true,
        bad_lines=frozenset(name for name, line in lines.items() if not _is_one_line(line)),
    )


def _real_name(name: str) -> str:
    """Resolve ``dspy.X`` and aliases such as ``BootstrapRS`` to the class's own name."""
    name = name.removeprefix("dspy.")
    cls = _public_class(name)
    return name if cls is None else cls.__name__


def _is_one_line(line: Any) -> bool:
    if not isinstance(line, str):
        return False
    line = line.strip()
    # What llm_query_batched gives in place of an answer that failed.
    return 0 < len(line) <= MAX_LINE_CHARS and "\n" not in line and not line.startswith("[ERROR]")
