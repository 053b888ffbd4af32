"""Flame graphs of the hot path, by py-spy from outside: ``docs/flame-host.svg`` and ``docs/flame-broker.svg``.

The broker runs in a container under another user; reading it takes root on the host. What is sampled is an execution
with one tool call, over and over, with the journal in memory: a flush of the disk is no work of ours.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.contenders import Sandbox
from benchmarks.state import State

_SECONDS = 8
_RATE_HZ = 400
_VARIANT = "memory_journal"
#: Frames with less of the samples than this are not drawn: nobody could read them, and the files stay small.
LEAST_SHARE = 0.002


def main(folder: Path) -> int:
    """Sample host and broker at the same time and draw both; exit code 0 if both files are there."""
    py_spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if py_spy is None:
        print("error: py-spy is not installed (pip install -e '.[bench]')", file=sys.stderr)
        return 1
    state = State(Sandbox())
    try:
        stacks = _sampled(py_spy, state)
    except subprocess.CalledProcessError as error:
        print(f"error: py-spy cannot read the processes (it takes root): {error.output.strip()}", file=sys.stderr)
        return 1
    finally:
        state.close()
    folder.mkdir(parents=True, exist_ok=True)
    for role, lines in stacks.items():
        path = folder / f"flame-{role}.svg"
        title = f"{role}: execution with one tool call, journal in memory"
        path.write_text(draw(parse(lines), title), "utf-8")
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


def _sampled(py_spy: str, state: State) -> dict[str, list[str]]:
    """Return py-spy's raw stacks by role."""
    interpreter = state.warm(_VARIANT)
    processes = state.processes(_VARIANT)
    # The supervisor comes first among the broker's; it sleeps.
    pids = {"host": os.getpid(), "broker": processes["broker"][-1]}
    with tempfile.TemporaryDirectory() as folder:
        spies = {role: _spy(py_spy, pid, Path(folder, role)) for role, pid in pids.items()}
        while any(spy.poll() is None for spy in spies.values()):
            interpreter.execute("double(21)")
        for spy in spies.values():
            output = spy.communicate()[0]
            if spy.returncode != 0:
                raise subprocess.CalledProcessError(spy.returncode, spy.args, output)
        return {role: Path(folder, role).read_text().splitlines() for role in pids}


def _spy(py_spy: str, pid: int, target: Path) -> subprocess.Popen[str]:
    options = [
        *("--format", "raw", "--duration", str(_SECONDS), "--rate", str(_RATE_HZ)),
        *("--function", "--nonblocking", "--output", str(target), "--pid", str(pid)),
    ]
    return subprocess.Popen(
        [py_spy, "record", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


class Frame:
    """A function in its callers' context, with the samples in it and below it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples = 0
        self.callees: dict[str, Frame] = {}


def parse(lines: Iterable[str]) -> Frame:
    """Return the tree of py-spy's raw stacks: ``outermost;...;innermost COUNT``."""
    root = Frame("all")
    for line in lines:
        stack, _, count = line.rpartition(" ")
        root.samples += int(count)
        frame = root
        for name in stack.split(";"):
            frame = frame.callees.setdefault(name, Frame(name))
            frame.samples += int(count)
    return root


_WIDTH, _ROW, _MARGIN, _CHARACTER = 1200, 17, 34, 6.2


def draw(root: Frame, title: str) -> str:
    """Return a flame graph as SVG: callers below, callees above, the width a frame's share of the samples."""
    floors: list[list[str]] = []
    _place(root, root, 0.0, 0, floors)
    height = _MARGIN + len(floors) * _ROW + 8
    shown = [
        f'<g transform="translate(0 {height - 8 - (depth + 1) * _ROW})">{"".join(boxes)}</g>'
        for depth, boxes in enumerate(floors)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
            f'height="{height}" font-family="monospace" font-size="10">',
            f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
            f'<text x="6" y="20" font-size="14">{html.escape(title)}: {root.samples:,} samples</text>',
            *shown,
            "</svg>\n",
        ]
    )


def _place(frame: Frame, root: Frame, x: float, depth: int, floors: list[list[str]]) -> None:
    """Add a frame to its floor, and those that it calls to the floors above."""
    if depth == len(floors):
        floors.append([])
    floors[depth].append(_box(frame, root, x))
    for callee in sorted(frame.callees.values(), key=lambda one: one.name):
        if callee.samples >= LEAST_SHARE * root.samples:
            _place(callee, root, x, depth + 1, floors)
        x += callee.samples / root.samples * _WIDTH


def _box(frame: Frame, root: Frame, x: float) -> str:
    share = frame.samples / root.samples if root.samples else 0.0
    width = share * _WIDTH
    fits = int(width / _CHARACTER) - 1
    text = f'<text x="2" y="12">{html.escape(frame.name[:fits])}</text>' if fits >= 3 else ""
    return (
        f'<g transform="translate({x:.1f} 0)"><title>{html.escape(frame.name)}: {frame.samples:,} samples, '
        f'{share:.1%}</title><rect width="{max(width - 0.5, 0.5):.1f}" height="{_ROW - 1}" '
        f'fill="{_colour(frame.name)}"/>{text}</g>\n'
    )


def _colour(name: str) -> str:
    """Ours blue, libraries orange, the frames above them grey."""
    if re.search(r"\((host_client|broker)/", name):
        return "#8ecae6"
    return "#f4c58a" if "(" in name else "#d5d8dc"
