"""Claims about figures, tables and files that generated code makes for people, with real workers."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path

import pytest

from broker.testing import InProcessBroker
from host_client import SandboxInterpreter
from host_client.artifacts import MAX_ARTIFACTS, mime_of
from host_client.errors import FileRefused
from host_client.providers.fake import FakeProvider
from tests.tools.conftest import Make

# Matplotlib is not in the image, so a stand-in with its names shows what the session does with it.
STAND_IN = """
import sys, types
pyplot = types.ModuleType("matplotlib.pyplot")
class Figure:
    def __init__(self, number): self.number, self.axes = number, []
    def savefig(self, path): open(path, "wb").write(b"\\x89PNG" + bytes([self.number]))
figures = {}
pyplot.get_fignums = lambda: sorted(figures)
pyplot.figure = lambda number=None: figures.setdefault(number or len(figures) + 1, Figure(number or len(figures) + 1))
pyplot.close = lambda figure: figures.pop(figure.number)
pyplot.plot = lambda *values: pyplot.figure(max(figures, default=1)).axes.append(values)
sys.modules["matplotlib"] = types.ModuleType("matplotlib")
sys.modules["matplotlib.pyplot"] = sys.modules["matplotlib"].pyplot = pyplot
"""


def test_what_code_saves_comes_back_with_a_type(make: Make, tmp_path: Path) -> None:
    interpreter = make()
    assert interpreter.artifacts == []
    interpreter.execute(
        "import os\nos.makedirs('artifacts/deep')\n"
        "open('artifacts/a.csv', 'w').write('x,y\\n')\nopen('artifacts/deep/notes.md', 'w').write('# Notes')\n"
        "open('artifacts/plot.svg', 'w').write('<svg/>')\nopen('artifacts/odd', 'wb').write(bytes(3))"
    )
    found = {artifact.name: artifact for artifact in interpreter.artifacts}
    assert {name: (each.kind, each.mime, each.size_bytes) for name, each in found.items()} == {
        "a.csv": ("table", "text/csv", 4),
        "odd": ("file", "application/octet-stream", 3),
        "plot.svg": ("figure", "image/svg+xml", 6),
        "deep/notes.md": ("file", "text/markdown", 7),
    }
    assert found["deep/notes.md"].read() == b"# Notes"
    found["a.csv"].save(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "x,y\n"


def test_open_figures_are_kept_and_closed(make: Make) -> None:
    interpreter = make()
    interpreter.execute(STAND_IN)
    interpreter.execute("pyplot.figure(1); pyplot.plot(1, 2); pyplot.figure(2)")  # the second is empty
    [artifact] = interpreter.artifacts
    assert (artifact.name, artifact.kind, artifact.mime, artifact.read()) == (
        "figure-1.png",
        "figure",
        "image/png",
        b"\x89PNG\x01",
    )
    assert interpreter.execute("sorted(figures)") == []
    interpreter.execute("pyplot.plot(3, 4)")
    assert [each.name for each in interpreter.artifacts] == ["figure-1.png", "figure-2.png"]


def test_a_real_figure_is_a_png(make: Make) -> None:
    interpreter = make()
    interpreter.execute("import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.show()")
    assert interpreter.last_result is not None
    assert interpreter.last_result.output == ""  # no warning that nothing can be shown
    [artifact] = interpreter.artifacts
    assert artifact.read().startswith(b"\x89PNG\r\n")


def test_a_table_that_was_shown_is_kept_once(make: Make, tmp_path: Path) -> None:
    interpreter = make(artifacts_to=tmp_path / "out")
    interpreter.execute("import pandas as pd\npd.DataFrame({'a': [1, 2], 'b': ['x', 'y']})")
    interpreter.execute("1 + 1")
    [artifact] = interpreter.artifacts
    assert (artifact.name, artifact.kind, artifact.mime) == ("table-1.csv", "table", "text/csv")
    assert artifact.host_path == tmp_path / "out" / "table-1.csv"
    assert list(csv.reader(artifact.host_path.read_text().splitlines())) == [
        ["", "a", "b"],
        ["0", "1", "x"],
        ["1", "2", "y"],
    ]


def test_saved_ones_outlive_the_session_and_change_with_it(make: Make, tmp_path: Path) -> None:
    interpreter = make(artifacts_to=str(tmp_path / "out"))
    interpreter.execute("import os\nos.makedirs('artifacts/d'); open('artifacts/d/x.txt', 'w').write('one')")
    assert (tmp_path / "out/d/x.txt").read_text() == "one"
    with pytest.raises(Exception, match="ZeroDivisionError"):
        interpreter.execute("open('artifacts/d/x.txt', 'w').write('three'); 1 / 0")
    assert (tmp_path / "out/d/x.txt").read_text() == "three"
    interpreter.shutdown()
    [artifact] = interpreter.artifacts
    assert artifact.read() == b"three"
    artifact.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "three"


def test_collecting_leaves_names_results_and_execution_alone(make: Make, tmp_path: Path) -> None:
    interpreter = make(artifacts_to=tmp_path)
    before = interpreter.execute("sorted(globals())")
    assert interpreter.execute("sorted(globals())") == before
    assert interpreter.last_result is not None
    assert interpreter.last_result.value == before


def test_links_and_devices_are_left_out(make: Make, tmp_path: Path) -> None:
    interpreter = make(artifacts_to=tmp_path / "out")
    interpreter.execute(
        "import os\nos.mkdir('artifacts'); os.symlink('/etc/passwd', 'artifacts/passwd'); os.mkfifo('artifacts/pipe')\n"
        "os.symlink('/etc', 'artifacts/etc'); open('artifacts/a.txt', 'w').write('a')"
    )
    assert [each.name for each in interpreter.artifacts] == ["a.txt"]
    assert os.listdir(tmp_path / "out") == ["a.txt"]
    interpreter.execute("import shutil\nshutil.rmtree('artifacts'); os.symlink('/etc', 'artifacts')")
    assert interpreter.artifacts == []


def test_too_many_and_too_large_ones_are_bounded_and_the_execution_stands(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("host_client.artifacts.MAX_ARTIFACT_BYTES", 1000)
    monkeypatch.setattr("host_client.artifacts.MAX_ARTIFACTS", 3)
    interpreter = make(artifacts_to=tmp_path)
    interpreter.execute("def make(i): open(f'artifacts/{i}', 'wb').write(bytes(1000 + (i == 1)))")
    interpreter.execute("import os\nos.mkdir('artifacts')")
    with caplog.at_level(logging.WARNING):
        assert interpreter.execute("for i in range(4): make(i)\n7") == 7
    assert sorted(os.listdir(tmp_path)) == ["0", "2"]
    assert [(each.name, each.host_path is None) for each in interpreter.artifacts] == [
        ("0", False),
        ("1", True),
        ("2", False),
    ]
    assert "artifacts/1: more than 1,000 bytes" in caplog.text
    with pytest.raises(FileRefused):
        interpreter.artifacts[1].read()


def test_a_session_that_spoils_the_collection_keeps_its_execution(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interpreter = make(artifacts_to=tmp_path)
    interpreter.execute("1")
    with caplog.at_level(logging.WARNING):
        assert interpreter.execute("import sys\nsys.modules['broker.worker.aside'] = None\n8") == 8
    assert "artefacts were not collected" in caplog.text


def test_a_figure_that_cannot_be_saved_spoils_nothing(make: Make) -> None:
    interpreter = make()
    interpreter.execute(STAND_IN + "Figure.savefig = None\npyplot.plot(1)\nimport os; os.makedirs('artifacts')")
    interpreter.execute("open('artifacts/a.txt', 'w').write('a')")
    assert [each.name for each in interpreter.artifacts] == ["a.txt"]


def test_the_model_is_told_where_artefacts_are_wanted(running_broker: InProcessBroker, tmp_path: Path) -> None:
    provider = FakeProvider(running_broker)
    factory = SandboxInterpreter.factory(provider=provider, artifacts_to=tmp_path)
    assert "artifacts/" in factory.execution_instructions
    assert factory().execution_instructions == factory.execution_instructions
    assert "artifacts/" not in SandboxInterpreter.factory(provider=provider).execution_instructions


def test_types_go_by_the_ending() -> None:
    assert mime_of("a/b.PNG") == "image/png"
    assert mime_of("b.parquet") == "application/vnd.apache.parquet"
    assert mime_of("b.html") == "text/html"
    assert mime_of("b") == "application/octet-stream"
    assert MAX_ARTIFACTS == 200
