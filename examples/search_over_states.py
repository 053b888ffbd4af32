"""Search over REPL states: go back to a point, try another step, and carry several branches on at the same time.

A word is to become another one, a letter at a time (cat, cot, cog, dog). The session holds the dictionary and the
ladder so far. Each round, every ladder that is kept is forked once for each step that the model proposes; the branches
run at the same time, each in its own namespace, and the best go on. Loading the dictionary happens once.

    python examples/search_over_states.py
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from host_client import SandboxInterpreter

START, GOAL = "cold", "warm"
#: Ladders that are carried on after a round.
BEAM = 3

#: Runs once: what is costly to make, every branch has for nothing.
SET_UP = """
import collections
by_shape = collections.defaultdict(set)
for word in words:
    for i in range(len(word)):
        by_shape[word[:i] + "_" + word[i + 1:]].add(word)
ladder = [start]

def next_words():
    last = ladder[-1]
    shapes = (last[:i] + "_" + last[i + 1:] for i in range(len(last)))
    return sorted(set().union(*(by_shape[shape] for shape in shapes)) - set(ladder))

def letters_right():
    return sum(a == b for a, b in zip(ladder[-1], goal))
"""


def main(argv: Sequence[str] = ()) -> int:
    """Find a ladder and print it, then show that going back costs nothing."""
    with SandboxInterpreter(tools={"propose": propose}) as root:
        root.execute(SET_UP, {"words": dictionary(), "start": START, "goal": GOAL})
        before = root.snapshot("before any step")
        print(" -> ".join(search(root)))

        root.execute("ladder += ['gold', 'mold']; by_shape.clear()")  # a step that ruins the state
        root.rollback(before)
        print("and back at", root.execute("ladder"), "with", root.execute("len(by_shape)"), "shapes")
    return 0


def search(root: SandboxInterpreter) -> list[str]:
    """Carry the best few states on, round by round, until one has the goal."""
    beam = root.fork()
    with ThreadPoolExecutor() as threads:
        while True:
            branches: list[tuple[SandboxInterpreter, str]] = []
            for state in beam:
                steps = state.execute("propose(ladder[-1], next_words())")
                branches += zip(state.fork(len(steps)), steps, strict=True)
                state.shutdown()
            scores = list(threads.map(take_step, branches))
            for (branch, _), score in zip(branches, scores, strict=True):
                if score == len(GOAL):
                    found: list[str] = branch.execute("ladder")
                    for other, _ in branches:
                        other.shutdown()
                    return found
            ranked = sorted(range(len(branches)), key=lambda i: -scores[i])
            beam = [branches[i][0] for i in ranked[:BEAM]]
            for i in ranked[BEAM:]:
                branches[i][0].shutdown()


def take_step(branch_and_word: tuple[SandboxInterpreter, str]) -> int:
    """Take one step in one branch; several of these run at the same time."""
    branch, word = branch_and_word
    score: int = branch.execute("ladder.append(word); letters_right()", {"word": word})
    return score


def propose(word: str, candidates: list[str]) -> list[str]:
    """Play the model: of the words that may follow, those that look promising, and one at random."""
    dice = random.Random(word)
    promising = sorted(candidates, key=lambda each: -sum(a == b for a, b in zip(each, GOAL, strict=True)))[:3]
    return sorted({*promising, dice.choice(candidates)})


def dictionary() -> list[str]:
    """Return a small dictionary of words of four letters."""
    text = """
    bold bolt card care cart cold colt cord core corm corn fold ford form gold hold mold sold told warm ward ware wand
    word wore work worm worn wart wary farm harm
    """
    return text.split()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
