"""How rich is everybody? An RLM reads a whole novel, chapter by chapter, and the result is plotted.

The same task as in Daytona's guide to DSPy's RLM, here on your own machine: a novel of some 1,300 pages goes
into the sandbox as a list of chapters, generated code sends batches of them to sub-queries with
``llm_query_batched``, collects their JSON over several iterations, and submits a typed list.

    python examples/novel_analysis.py                        # fetches The Count of Monte Cristo
    python examples/novel_analysis.py --file my_novel.txt --characters Anna Wronski
    python examples/novel_analysis.py --scripted             # no key: counts words instead of understanding
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dspy
import requests

from host_client import SandboxInterpreter
from host_client.demo.models import ScriptedActions, example_model

BOOK_URL = "https://www.gutenberg.org/cache/epub/1184/pg1184.txt"
CHARACTERS = ("Dantès", "Danglars", "Fernand", "Villefort", "Mercédès")

TASK = """Follow the wealth of these characters through the novel: {characters}.
For each chapter that states or implies how wealthy one of them is, give a dict with the keys `chapter` (int, from 1),
`character` (str, a name from this list), `wealth` (int, 1 is destitute and 10 is the richest person of the book) and
`event` (str, a few words on what happened). Cover every chapter, in batches of sub-queries."""

# A heading is shorter than this, and a chapter longer: that tells chapters from the table of contents.
_SHORTEST_CHAPTER_CHARS = 400


def main(argv: Sequence[str] | None = None) -> int:
    """Analyse the novel, print a summary and save the plot."""
    options = _parser().parse_args(argv)
    chapters = split_chapters(read_book(options.file, options.url))
    print(f"{len(chapters)} chapters, {sum(map(len, chapters)):,} characters")
    with example_model(SCRIPT, only_scripted=options.scripted):
        rlm = dspy.RLM(
            "chapters: list[str], characters: list[str], task: str -> wealth_data: list[dict]",
            max_iters=40,
            max_llm_calls=500,
            interpreter_factory=SandboxInterpreter.factory(),
        )
        task = TASK.format(characters=", ".join(options.characters))
        result = rlm(chapters=chapters, characters=list(options.characters), task=task)
    points = checked_points(result.wealth_data, len(chapters), options.characters)
    for name in options.characters:
        print(f"{name:<12} {sum(point['character'] == name for point in points)} chapters")
    plot(points, options.characters, options.out)
    print(f"plot: {options.out}")
    return 0


def read_book(file: Path | None, url: str) -> str:
    """Return the book's text from a file, else from its public source."""
    if file is not None:
        return file.read_text(encoding="utf-8")
    reply = requests.get(url, timeout=60)
    reply.raise_for_status()
    return reply.content.decode("utf-8-sig")


def split_chapters(book: str) -> list[str]:
    """Split at lines such as ``Chapter 12. Father and Son`` or ``CHAPTER XII``; a table of contents is left out.

    Raises:
        ValueError: There are no such lines.
    """
    parts = re.split(r"^(?=[ \t]*chapter[ \t]+(?:\d+|[ivxlc]+)\b)", book, flags=re.IGNORECASE | re.MULTILINE)
    chapters = [part.strip() for part in parts[1:] if len(part.strip()) >= _SHORTEST_CHAPTER_CHARS]
    if not chapters:
        raise ValueError("found no chapters: the text needs lines like 'Chapter 1'")
    return chapters


def checked_points(wealth_data: Any, chapters: int, characters: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows that are what was asked for: the answer is a model's, and typed only as far as `list[dict]`."""
    return [
        row
        for row in wealth_data
        if isinstance(row.get("chapter"), int)
        and 1 <= row["chapter"] <= chapters
        and isinstance(row.get("wealth"), (int, float))
        and 1 <= row["wealth"] <= 10
        and row.get("character") in characters
    ]


def plot(points: Sequence[Mapping[str, Any]], characters: Sequence[str], out: Path) -> None:
    """Save a plot of wealth over chapters, one line per character: the mean of five mentions in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
    for name in characters:
        rows = sorted((row["chapter"], row["wealth"]) for row in points if row["character"] == name)
        where = [chapter for chapter, _ in rows]
        wealth = [value for _, value in rows]
        smooth = [_mean(wealth[max(0, at - 2) : at + 3]) for at in range(len(wealth))]
        [line] = axes.plot(where, smooth, label=name, linewidth=2)
        axes.scatter(where, wealth, s=10, alpha=0.4, color=line.get_color())
    axes.set(xlabel="chapter", ylabel="wealth (1 destitute, 10 richest)", ylim=(0.5, 10.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", frameon=False, ncols=len(characters))
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_RICH = r"rich|wealth|fortune|million|gold|treasure|diamond|jewel|palace|luxur|banker|estate|francs"
_POOR = r"poor|poverty|debt|ruin|bankrupt|starv|hunger|hungry|beggar|rags|prison|dungeon|misery|penniless"


def count_words(prompt: str) -> str:
    """Play the sub-model: rate a character by the words around the name. No understanding, but no invention either."""
    names = json.loads(re.findall(r"^characters: (.*)$", prompt, re.MULTILINE)[0])
    rows = []
    for number, text in re.findall(r"<chapter (\d+)>\n(.*?)\n</chapter>", prompt, re.DOTALL):
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        for name in names:
            about = [s for s in sentences if name in s and re.search(f"{_RICH}|{_POOR}", s, re.IGNORECASE)]
            if about:
                rich, poor = (len(re.findall(words, " ".join(about), re.IGNORECASE)) for words in (_RICH, _POOR))
                wealth = max(1, min(10, round(5.5 + 4.5 * (rich - poor) / (rich + poor))))
                rows.append({"chapter": int(number), "character": name, "wealth": wealth, "event": about[0][:120]})
    return json.dumps(rows, ensure_ascii=False)


#: What the scripted model does instead of thinking.
SCRIPT = ScriptedActions(
    [
        (
            "How many chapters are there, how long are they, and what do they look like?",
            """
print("chapters:", len(chapters))
print("longest:", max(map(len, chapters)), "characters")
print(chapters[0][:200])
""",
        ),
        (
            "Ten chapters fit into one sub-query. I try the first half, all batches at once, and parse the replies.",
            """
import json

def question(first, last):
    body = "\\n".join(f"<chapter {n}>\\n{chapters[n - 1]}\\n</chapter>" for n in range(first, last + 1))
    return (task + "\\nAnswer for these chapters only, with a JSON list and nothing else.\\n"
            + "characters: " + json.dumps(characters, ensure_ascii=False) + "\\n" + body)

def analyse(spans):
    for span, reply in zip(spans, llm_query_batched([question(*span) for span in spans])):
        try:
            rows.extend(json.loads(reply))
        except ValueError as error:
            failed.append((span, str(error)))
    print("rows:", len(rows), "failed:", failed)

rows, failed = [], []
spans = [(n, min(n + 9, len(chapters))) for n in range(1, len(chapters) + 1, 10)]
half = (len(spans) + 1) // 2
analyse(spans[:half])
""",
        ),
        ("That works; `rows` is kept. Now the other half.", "analyse(spans[half:])"),
        (
            "Before I submit: is every row complete, and are all characters there?",
            """
keys = {"chapter", "character", "wealth", "event"}
print("incomplete:", [row for row in rows if set(row) != keys])
print({name: sum(row["character"] == name for row in rows) for name in characters})
""",
        ),
        ("Complete.", 'SUBMIT(wealth_data=sorted(rows, key=lambda row: (row["chapter"], row["character"])))'),
    ],
    count_words,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Plot the wealth of a novel's characters, chapter by chapter.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--file", type=Path, help="a plain text file with the novel")
    source.add_argument("--url", default=BOOK_URL, help="where to fetch it (%(default)s)")
    parser.add_argument("--characters", nargs="+", default=list(CHARACTERS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("novel_wealth.png"), help="the plot (%(default)s)")
    parser.add_argument("--scripted", action="store_true", help="count words instead of asking a model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
