"""The scripted model of the demo: it reads what the REPL printed and decides its next move from that.

Nothing about the answer is written here. Names come out of the printed output, sentences out of the
source code in the sub-query; where the output is not what a move expects, the model says so and stops.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Sequence

from host_client.demo import snippets
from host_client.demo.chat_format import ActionRequest, Step, is_action, read_action, write_action
from host_client.demo.reader import INSIST, describe_class
from host_client.demo.scripted_lm import Message


class ScriptStuck(RuntimeError):
    """The REPL printed something that the script has no move for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """What the model does next."""

    reasoning: str
    code: str


class SourceReader:
    """Plays the model: actions for the RLM's prompts, one sentence for each sub-query. Has no state."""

    def __call__(self, messages: Sequence[Message], /) -> str:
        """Return the reply to an action prompt or to a sub-query."""
        if not is_action(messages):
            return describe_class(messages[-1].text)
        move = next_move(read_action(messages))
        return write_action(move.reasoning, move.code)


def next_move(request: ActionRequest) -> Move:
    """Decide from the history.

    Raises:
        ScriptStuck: The last output is an error that the script cannot repair, or lacks what it needs.
    """
    if request.steps and request.steps[-1].failed:
        return _repair(request.steps)
    facts = read_facts(request.steps)
    for is_due, move in _MOVES:
        if is_due(facts):
            return move(facts)
    return _submit(facts)


Facts = dict[str, str]


def read_facts(steps: Sequence[Step]) -> Facts:
    """Collect the ``name: value`` lines of all outputs; a later one replaces an earlier one."""
    facts: Facts = {}
    for step in steps:
        facts.update(re.findall(r"^([a-z][a-z ]*): (.*)$", step.output, re.MULTILINE))
    return facts


def _repair(steps: Sequence[Step]) -> Move:
    failed = steps[-1]
    if len(steps) > 1 and steps[-2].failed:
        raise ScriptStuck(f"two errors in a row, the last one: {failed.output[:300]}")
    if "'NoneType' object has no attribute 'splitlines'" not in failed.output or snippets.FRAGILE not in failed.code:
        raise ScriptStuck(f"no repair for: {failed.output[:300]}")
    code = failed.code.replace("classes = {}", snippets.KEPT).replace(snippets.FRAGILE, snippets.SOUND)
    return Move(
        "An AttributeError: get_docstring() returned None, so some class has no docstring. The REPL keeps its "
        "state, so what was collected before the error is still there; guard that line and go on.",
        code,
    )


def _explore(facts: Facts) -> Move:
    return Move(
        "I have not seen the data yet. First its shape: how many files, how much text, which folders.",
        snippets.EXPLORE,
    )


def _collect(facts: Facts) -> Move:
    return Move(
        f"{facts['files']} files with {int(facts['characters']):,} characters: too much to read, but not to parse. "
        "I collect every class with its bases through `ast`, and count which bases are used most.",
        snippets.COLLECT,
    )


def _find(facts: Facts) -> Move:
    bases = _counts(facts, "bases")
    roots = {"module_root": "Module", "optimizer_root": "Teleprompter"}
    for root in roots.values():
        if root not in bases:
            raise ScriptStuck(f"no class has the base {root}; the printed ones are {bases}")
    return Move(
        f"{facts['classes']} classes. {bases['Module']} inherit from Module directly and {bases['Teleprompter']} from "
        "Teleprompter (DSPy's older word for optimizer). I follow inheritance to its end, then ask the host which "
        "names are public.",
        snippets.FIND.substitute(roots),
    )


def _describe_modules(facts: Facts) -> Move:
    names = _names(facts, "modules")
    if not names or not _names(facts, "optimizers"):
        raise ScriptStuck(f"found no modules or no optimizers: {facts}")
    return Move(
        f"{len(names)} modules and {len(_names(facts, 'optimizers'))} optimizers. What a class is for is a "
        "matter of meaning: one sub-query per class, all modules at once.",
        snippets.DESCRIBE.substitute(group="modules"),
    )


def _describe_optimizers(facts: Facts) -> Move:
    return Move(
        f"{facts['described']} described. `ask` and `lines` are still there, so the optimizers take one line.",
        snippets.DESCRIBE_MORE.substitute(group="optimizers"),
    )


def _look_closer(facts: Facts) -> Move:
    names = _names(facts, "unclear")
    listed = ", ".join(names[:4]) + (" and others" if len(names) > 4 else "")
    return Move(
        f"{len(names)} of the answers say UNCLEAR: {listed} have no docstring to go by. I ask again for these "
        "only, with the places that use them.",
        snippets.LOOK_CLOSER.substitute(insist=INSIST),
    )


def _verify(facts: Facts) -> Move:
    return Move("Every class has a line. Before I submit: is any missing, doubled or too long?", snippets.VERIFY)


def _submit(facts: Facts) -> Move:
    if facts["verified"] != "True":
        raise ScriptStuck(f"the check failed: {facts}")
    return Move("The check is clean. I submit the values from the REPL, without retyping them.", snippets.SUBMIT)


def _undescribed(facts: Facts) -> bool:
    done, total = re.findall(r"\d+", facts["described"])
    return int(done) < int(total)


#: In order: the first move that is due is made; when none is, the model submits.
_MOVES: tuple[tuple[Callable[[Facts], bool], Callable[[Facts], Move]], ...] = (
    (lambda facts: "files" not in facts, _explore),
    (lambda facts: "classes" not in facts, _collect),
    (lambda facts: "optimizers" not in facts, _find),
    (lambda facts: "described" not in facts, _describe_modules),
    (_undescribed, _describe_optimizers),
    (lambda facts: facts["unclear"] != "[]", _look_closer),
    (lambda facts: "verified" not in facts, _verify),
)


def _names(facts: Facts, name: str) -> list[str]:
    value = _literal(facts, name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ScriptStuck(f"'{name}:' is not a list of names: {facts[name][:200]}")
    return value


def _counts(facts: Facts, name: str) -> dict[str, int]:
    value = _literal(facts, name)
    if not isinstance(value, dict):
        raise ScriptStuck(f"'{name}:' is not a dict: {facts[name][:200]}")
    return value


def _literal(facts: Facts, name: str) -> object:
    """Read a printed list or dict; it is output of the sandbox, so only literals are accepted."""
    try:
        return ast.literal_eval(facts[name])
    except (KeyError, ValueError, SyntaxError) as error:
        raise ScriptStuck(f"'{name}:' was not printed as expected: {error}") from None
