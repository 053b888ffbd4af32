"""The sub-model of the demo: one sentence about a class, taken from nothing but the text it is given."""

from __future__ import annotations

import re

MAX_SENTENCE_CHARS = 200

_UNCLEAR = "UNCLEAR: this excerpt does not say."
INSIST = "Answer from its methods if need be."

_NAME = re.compile(r"the class (\w+)")
_CODE = re.compile(r"<source>\n(.*?)\n</source>", re.DOTALL)
# A docstring after the header of the class, or of a function in it; group 1 tells which of them it is.
_DOCSTRING = re.compile(
    r'^( *)(?:class|def|async def) (?:(?!:[ ]*\n).)*:[ ]*\n\s*r?"""(.*?)"""', re.DOTALL | re.MULTILINE
)
# A method's docstring is about the method, unless it speaks of one of these.
_ABOUT_CLASS = re.compile(r"\b(module|optimi[zs]|teleprompter|agent|program)", re.IGNORECASE)
_METHOD = re.compile(r"^    def ([a-z]\w*)\(\s*self,?\s*([^)]*)\)", re.MULTILINE)


def describe_class(prompt: str) -> str:
    """Answer "what does the class X do?" from the source in the prompt: a docstring's first sentence.

    Without one it says so, unless the prompt asks for an answer from the methods.
    """
    name, code = _NAME.search(prompt), _CODE.search(prompt)
    if name is None or code is None:
        return _UNCLEAR
    for indent, docstring in _DOCSTRING.findall(code[1]):
        sentence = _first_sentence(docstring)
        if sentence and (not indent or _ABOUT_CLASS.search(sentence) or name[1].lower() in sentence.lower()):
            return sentence
    return _from_methods(name[1], code[1]) if INSIST in prompt else _UNCLEAR


def _first_sentence(docstring: str) -> str:
    """Return the first sentence of prose, or an empty string where a docstring only lists arguments."""
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    deprecated = paragraphs[0].startswith(".. deprecated::")
    text = " ".join(paragraphs[1 if deprecated and len(paragraphs) > 1 else 0].split())
    if re.match(r"(Args|Arguments|Parameters|Returns|Examples?|Note|:param)\b", text) or len(text) < 15:
        return ""
    sentence = re.split(r"(?<=[a-z0-9)`])[.:](?:\s|$)", text, maxsplit=1)[0]
    if len(sentence) > MAX_SENTENCE_CHARS:
        sentence = sentence[:MAX_SENTENCE_CHARS].rsplit(" ", 1)[0] + " ..."
    return ("Deprecated. " if deprecated else "") + sentence[0].upper() + sentence[1:].rstrip(".") + "."


def _from_methods(name: str, code: str) -> str:
    methods = [(method, _parameters(arguments)) for method, arguments in _METHOD.findall(code)]
    if not methods:
        return f"{name} adds nothing of its own to its base class."
    method, arguments = next((m for m in methods if m[0] in {"compile", "forward"}), methods[0])
    others = [other for other, _ in methods if other != method][:3]
    also = f", with {', '.join(others)}" if others else ""
    return f"Undocumented: works through {method}({arguments}){also}."


def _parameters(arguments: str) -> str:
    names = [re.split(r"[:=]", part)[0].strip() for part in re.split(r",(?![^\[]*\])", arguments)]
    shown = [name for name in names if name and name != "*"]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")
