"""Claims about sessions that are saved to a file and restored from it, with real workers."""

from __future__ import annotations

import json
import os
import pickle
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host_client import (
    RestoreFailed,
    SandboxInterpreter,
    SavedFileDamaged,
    SavedFileMismatch,
    SavedFileNewer,
    SaveFailed,
    SessionBusy,
    SessionLost,
    cli,
)
from tests.tools.conftest import Make
from tests.tools.saved_files import rewrite, write

#: Steps of this size make small payloads take several.
CHUNK_BYTES = 1000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "session.saved"


@pytest.fixture
def interpreter(make: Make) -> SandboxInterpreter:
    return make()


def moved(make: Make, code: str, file: Path, **keywords: Any) -> SandboxInterpreter:
    """Run code in a session, save it, and return another session in which it was restored."""
    first, second = make(**keywords), make(**keywords)
    first.execute(code)
    assert first.save(file).not_saved == {}
    assert second.restore(file).not_restored == {}
    return second


def test_variables_come_back_with_what_they_share(make: Make, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("host_client.saving.CHUNK_BYTES", CHUNK_BYTES)
    code = """
import numpy as np, pandas as pd, collections, math
shared = [1]
also = shared
table = {"rows": shared, "text": "x" * 5000, (1, 2): {3, 4}, "nan": math.nan}
table["self"] = table
array = np.arange(10_000).reshape(100, 100)
view = {"array": array}
frame = pd.DataFrame({"a": [1, 2], "b": ["x", "naïve \\ud800"[:5]]})
counts = collections.Counter("abca")
everything = globals()
"""
    restored = moved(make, code, file)
    assert restored.execute("""
shared.append(2)
[also, table["rows"], table["self"] is table, len(table["text"]), table[(1, 2)] == {3, 4}, math.isnan(table["nan"]),
 view["array"] is array, int(array.sum()), frame.to_dict("list"), counts["a"], everything is globals(), np.__name__]
""") == [[1, 2], [1, 2], True, 5000, True, True, True, 49995000, {"a": [1, 2], "b": ["x", "naïve"]}, 2, True, "numpy"]


def test_functions_find_their_globals_in_the_session_that_they_are_restored_in(make: Make, file: Path) -> None:
    code = """
import functools
x = 1
def f(a=[0], *, b=2): "Says."; return x + a[0] + b
f.note = "mine"
g = lambda: later()
@functools.cache
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
def make():
    n = 0
    def step():
        nonlocal n
        n += 1
        return n
    def read(): return n
    def down(k): return k if k == 0 else down(k - 1)
    return step, read, down
step, read, down = make()
step()
async def later_on(): return x
"""
    restored = moved(make, code, file)
    assert restored.execute("""
x = 10
def later(): return "later"
[f(), f.__doc__, f.note, f.__defaults__, g(), fib(30), step(), read(), down(5), await later_on(),
 f.__globals__ is globals()]
""") == [12, "Says.", "mine", [[0]], "later", 832040, 2, 2, 0, 10, True]
    with pytest.raises(
        Exception, match=r'(?s)<execution saved \w+>", line 6.*g = lambda: later\(\).*NameError: .*later'
    ):
        restored.execute("del later\ng()")


def test_classes_and_their_instances_belong_together_afterwards(make: Make, file: Path) -> None:
    code = """
import dataclasses, enum, typing
factor = 2
@dataclasses.dataclass
class Point:
    x: int
    def scaled(self): return self.x * factor
class Named(Point):
    kind = "named"
    def scaled(self): return super().scaled() + 1
    @property
    def double(self): return 2 * self.x
    @classmethod
    def of(cls, x): return cls(x)
class Colour(enum.Enum):
    RED = 1
class Pair(typing.NamedTuple):
    a: int
points, colour, pair, bound = [Point(1), Named.of(2)], Colour.RED, Pair(1), Point(5).scaled
"""
    restored = moved(make, code, file)
    assert restored.execute("""
factor = 10
[points[0].scaled(), points[1].scaled(), points[1].double, isinstance(points[1], Point), type(points[1]) is Named,
 colour is Colour.RED, pair.a, type(pair) is Pair, bound(), points[0] == Point(1)]
""") == [10, 21, 4, True, True, True, 1, True, 50, True]


def test_restoring_where_it_was_saved_gives_back_the_point_in_time(interpreter: SandboxInterpreter, file: Path) -> None:
    interpreter.execute("class C:\n    n = 1\nc, data = C(), [1]\ndef f(): return data")
    before = interpreter.save(file)
    interpreter.execute("old = C; C.n = 2; data.append(2); late = 1")
    for _ in range(2):
        assert interpreter.restore(file).restored == before.saved == ("C", "c", "data", "f")
        assert interpreter.execute("data.append(0)\n[C.n, c.n, f(), type(c) is C, 'late' in globals()]") == [
            *(1, 1, [1, 0], True, False)
        ]


def test_what_cannot_be_saved_is_named_with_its_path_and_the_rest_is_saved(make: Make, file: Path) -> None:
    interpreter = make()
    interpreter.execute("""
import threading, socket, subprocess, sys
g = (n for n in [1])
f = open("/dev/null")
thread = threading.Thread(target=print)
lock = threading.RLock()
sock = socket.socket(socket.AF_UNIX)
class Box: pass
box = Box()
box.inner = {"list": [0, Box()], 1: 2}
box.inner["list"][1].handle = f
def closes_over():
    mine = g
    return lambda: mine
uses = closes_over()
class Bad:
    def __getstate__(self): raise ValueError("not me")
class Leaves:
    def __reduce__(self): raise SystemExit(3)
bad, leaves = [Bad()], Leaves()
deep = []
for _ in range(100_000): deep = [deep]
frame = sys._getframe()
shared = ["kept"]
half = [shared, g]
import types
made = sys.modules["made"] = types.ModuleType("made")
exec("class Inside: pass\\ndef f(): return 1", vars(made))
of_made = [made.Inside()]
unlisted = types.ModuleType("unlisted")
unlisted.value = [1]
also = shared
def later(): return g
globals()[5] = globals()["\\x1b[31m"] = 1
""")
    saved = interpreter.save(file)
    assert saved.not_saved == {
        "g": "generator",
        "f": "open file",
        "thread": "thread",
        "lock": "lock",
        "sock": "socket",
        "box": "box.inner['list'][1].handle: open file",
        "uses": "uses's variable mine: generator",
        "bad": "bad[0]: ValueError: not me",
        "leaves": "SystemExit: 3",
        "deep": "nested too deeply",
        "frame": "stack frame",
        "half": "half[1]: generator",
        "made": "of the module 'made', which code made and no file",
        "of_made": "of the module 'made', which code made and no file",
        "5": "a name that is no ordinary text",
        "'\\x1b[31m'": "a name that is no ordinary text",
    }
    assert {"Box", "unlisted", "shared", "also", "later", "closes_over"} <= set(saved.saved)
    restored = make()
    assert restored.restore(file).not_saved == saved.not_saved
    assert restored.execute("[shared is also, also, 'half' in globals()]") == [True, ["kept"], False]
    with pytest.raises(Exception, match="NameError: name 'g' is not defined"):
        restored.execute("later()")


def test_saving_leaves_the_session_as_it_was_whatever_its_objects_do(
    interpreter: SandboxInterpreter, file: Path
) -> None:
    for _ in range(3):
        interpreter.execute("1")  # the lane, which is a descriptor, is there from here on
    interpreter.execute("""
import os, sys, threading
counts = []
class Meddler:
    def __reduce__(self):
        counts.append(1); globals()["planted"] = 1; print("seen"); sys.setrecursionlimit(500)
        return str, ("meddled",)
meddler = Meddler()
g = (n for n in range(3))
next(g)
limit, threads, files = sys.getrecursionlimit(), threading.active_count(), len(os.listdir("/proc/self/fd"))
""")
    interpreter.save(file)
    assert interpreter.execute("""
[counts, 'planted' in globals(), next(g), sys.getrecursionlimit() == limit, threading.active_count() == threads,
 len(os.listdir("/proc/self/fd")) == files, [n for n in globals() if n.startswith("__rlm")]]
""") == [[], False, 1, True, True, True, []]
    assert interpreter.execute("print('on')") == "on"


def test_tools_are_those_of_the_session_that_it_is_restored_in(make: Make, file: Path) -> None:
    first = make(tools={"shout": str.upper, "gone": str.lower})
    first.execute("say, table = shout, {'shout': shout, 'gone': gone, 'SUBMIT': SUBMIT}")
    assert first.save(file).saved == ("say", "table")
    second = make(tools={"shout": lambda text: f"{text}!"})
    second.restore(file)
    assert second.execute("[say('a'), table['shout']('b'), shout('c'), table['SUBMIT'] is SUBMIT]") == [
        *("a!", "b!", "c!", True)
    ]
    with pytest.raises(Exception, match="the tool 'gone' of the saved session is not among the tools of this one"):
        second.execute("table['gone']('d')")


@pytest.mark.parametrize(
    "held", ["token = os.environ['TOKEN']", "def f(): return 'top-secret-42'", "d = {'a': ['-top-secret-42-' * 9]}"]
)
def test_a_variable_that_holds_a_secret_is_not_saved_and_says_so(make: Make, file: Path, held: str) -> None:
    interpreter = make(secrets={"TOKEN": "top-secret-42"})
    interpreter.execute("import os\nharmless = 1")
    interpreter.execute(held)
    saved = interpreter.save(file)
    assert saved.saved == ("os", "harmless")
    assert list(saved.not_saved.values()) == ["holds the secret TOKEN"]
    assert b"top-secret-42" not in file.read_bytes()


def test_a_session_that_hides_its_secrets_from_the_search_is_caught_by_the_host(make: Make, tmp_path: Path) -> None:
    interpreter = make(secrets={"TOKEN": "top-secret-42"})
    interpreter.execute("import os\ntoken = os.environ.pop('TOKEN')")
    with pytest.raises(SaveFailed, match="it would hold the secret TOKEN"):
        interpreter.save(tmp_path / "new")
    assert os.listdir(tmp_path) == []
    assert interpreter.execute("len(token)") == 13


def test_a_file_is_private_complete_and_replaced_only_when_asked(
    interpreter: SandboxInterpreter, file: Path, tmp_path: Path
) -> None:
    interpreter.execute("x = 1")
    saved = interpreter.save(str(file))
    assert (saved.path, saved.size, stat.S_IMODE(file.stat().st_mode)) == (file, file.stat().st_size, 0o600)
    with pytest.raises(SaveFailed, match="there is a file already") as caught:
        interpreter.save(file)
    assert caught.value.path == str(file)
    assert "overwrite=True" in str(caught.value)
    interpreter.execute("y = 1")
    assert interpreter.save(file, overwrite=True).saved == ("x", "y")
    for wrong in (tmp_path, tmp_path / "none" / "x", Path("/proc/x")):
        with pytest.raises(SaveFailed):
            interpreter.save(wrong)
    assert os.listdir(tmp_path) == [file.name]


def test_an_execution_that_runs_and_an_ended_session_are_told_apart(make: Make, file: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        leave.wait(60)

    interpreter = make(tools={"hold": hold})
    thread = threading.Thread(target=interpreter.execute, args=("hold()",))
    thread.start()
    assert entered.wait(60)
    with pytest.raises(SessionBusy):
        interpreter.save(file)
    leave.set()
    thread.join()
    interpreter.save(file)
    with pytest.raises(SessionLost):
        interpreter.execute("import os; os.kill(os.getpid(), 9)")
    for use in (interpreter.save, interpreter.restore):
        with pytest.raises(SessionLost):
            use(file if use == interpreter.restore else file.with_name("other"))


@pytest.fixture
def alive(interpreter: SandboxInterpreter, file: Path) -> Iterator[SandboxInterpreter]:
    """A session with a saved file, which must have its variable afterwards."""
    interpreter.execute("import numpy\nvalue, data = 1, numpy.zeros(3)")
    interpreter.save(file)
    interpreter.execute("value = 'before'; only = 1")
    yield interpreter
    assert interpreter.execute("[value, only]") == ["before", 1]


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("at", [0, 14, 20, 40, 70, -3])
def test_a_changed_file_is_named_and_nothing_is_restored(alive: SandboxInterpreter, file: Path, at: int) -> None:
    flip(file, at)
    with pytest.raises(SavedFileDamaged) as caught:
        alive.restore(file)
    assert caught.value.path == str(file)


@pytest.mark.parametrize("size", [0, 5, 63, 64, 200])
def test_a_file_that_was_cut_off_is_named(alive: SandboxInterpreter, file: Path, size: int) -> None:
    os.truncate(file, size)
    with pytest.raises(SavedFileDamaged):
        alive.restore(file)


def test_other_files_and_formats_are_named(alive: SandboxInterpreter, file: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickle"
    pickled.write_bytes(pickle.dumps({"x": 1}) * 20)
    for other in (pickled, tmp_path, tmp_path / "nothing", Path("/dev/null")):
        with pytest.raises(SavedFileDamaged):
            alive.restore(other)
    write(file, b"{}", found_format=2)
    with pytest.raises(SavedFileNewer, match=r"format 2.*reads format 1"):
        alive.restore(file)


def test_another_python_or_package_is_named_and_packages_may_be_ignored(alive: SandboxInterpreter, file: Path) -> None:
    original = file.read_bytes()
    rewrite(file, lambda header: header["packages"].update(numpy="1.0", absent="2.0"))
    with pytest.raises(SavedFileMismatch, match=r"numpy 1\.0 \(here .*\), absent 2\.0 \(here missing\)") as caught:
        alive.restore(file)
    assert set(caught.value.differs) == {"numpy", "absent"}
    assert "ignore_versions=True" in str(caught.value)
    rewrite(file, lambda header: header.update(python="3.7.1"))
    for ignore_versions in (False, True):
        with pytest.raises(SavedFileMismatch, match=r"Python 3\.7\.1") as caught:
            alive.restore(file, ignore_versions=ignore_versions)
        assert caught.value.differs["python"][0] == "3.7.1"
    file.write_bytes(original)
    rewrite(file, lambda header: header["packages"].update(numpy="1.0"))
    assert alive.restore(file, ignore_versions=True).restored == ("numpy", "value", "data")
    alive.execute("value, only = 'before', 1")


def test_an_image_without_cloudpickle_says_what_helps(alive: SandboxInterpreter, file: Path, tmp_path: Path) -> None:
    alive.execute("import sys, broker.worker.durable.pickling as p\np.pickler_class.cache_clear()")
    alive.execute("""
kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] == 'cloudpickle'}
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "cloudpickle": raise ModuleNotFoundError(name)
sys.meta_path.insert(0, hidden := Hidden())
""")
    for use, error in ((alive.save, SaveFailed), (alive.restore, RestoreFailed)):
        with pytest.raises(error, match=r"(?s)the sandbox cannot.*packages=\('cloudpickle',\)"):
            use(file if error is RestoreFailed else tmp_path / "new")
    alive.execute("sys.meta_path.remove(hidden); sys.modules.update(kept)")


def test_what_fails_while_it_is_restored_is_named_and_the_rest_is_there(make: Make, file: Path) -> None:
    first, second = make(), make()
    first.execute("""
import sys
open("helper.py", "w").write("class Thing: pass\\ndef make(): return 1")
import helper
class Picky:
    def __setstate__(self, state): raise LookupError("not here")
    def __getstate__(self): return {"a": 1}
inside = [1, 2]
thing, picky, before = helper.Thing(), [Picky(), inside], inside
after = {"inside": inside, "text": "kept"}
with_picky = {"it": picky}
last = [3]
""")
    assert first.save(file).not_saved == {}
    second.execute("old = 1")
    restored = second.restore(file)
    assert set(restored.not_restored) == {"helper", "thing", "picky", "with_picky"}
    assert restored.not_restored["helper"] == "ModuleNotFoundError: No module named 'helper'"
    assert restored.not_restored["picky"] == "LookupError: not here"
    assert restored.not_restored["with_picky"] == "shares data with 'picky', which could not be restored"
    assert second.execute("[before is after['inside'], after['text'], last, Picky.__name__, 'old' in globals()]") == [
        *(True, "kept", [3], "Picky", False)
    ]


def test_inspect_shows_what_is_in_a_file_and_runs_nothing_of_it(
    alive: SandboxInterpreter, file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    alive.execute("g = (n for n in [])")
    alive.save(file, overwrite=True)
    ran = tmp_path / "ran"
    hostile = b"cposix\nsystem\n(S'touch %s'\ntR." % bytes(ran)
    rewrite(file, lambda header: None, payload=hostile)
    assert cli.main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["numpy", "value", "data", "only", "1", "g:"]
    assert cli.main(["inspect", "--json", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["not_saved"] == {"g": "generator"}
    flip(file, 70)
    assert cli.main(["inspect", str(file)]) == 1
    assert "is not what was saved" in capsys.readouterr().err
    assert not ran.exists()


def test_a_full_disk_of_the_host_is_named_and_nothing_is_left(
    alive: SandboxInterpreter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from host_client import DiskFull, saved_file

    def full(self: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(saved_file.NewFile, "write", full)
        with pytest.raises(DiskFull, match=r"new: No space left"):
            alive.save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["session.saved"]


def test_objects_that_never_end_meet_the_deadline_and_the_variable_is_named(make: Make, file: Path) -> None:
    first, second = make(execution_timeout_s=2.0), make(execution_timeout_s=2.0)
    first.execute("""
class Endless:
    def __reduce__(self):
        while True:
            try:
                while True: pass
            except BaseException: pass
fine, endless = 1, Endless()
""")
    with pytest.raises(SaveFailed, match=r"longer than execution_timeout_s=2, and was at the variable 'endless'"):
        first.save(file)
    assert first.execute("[fine, type(endless) is Endless]") == [1, True]
    first.execute("""
def wait():
    while True: pass
class Late:
    def __reduce__(self): return wait, ()
endless = Late()
""")
    first.execution_timeout_s = None
    first.save(file)
    second.execute("old = [1]")
    with pytest.raises(RestoreFailed, match=r"exceeded its 2 s|took longer than"):
        second.restore(file)
    assert second.execute("[old, 'fine' in globals()]") == [[1], False]


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)", "ctypes.string_at(0)"])
def test_objects_that_end_the_process_that_saves_end_no_session(
    interpreter: SandboxInterpreter, file: Path, end: str
) -> None:
    interpreter.execute(f"""
import os, ctypes
class Ends:
    def __reduce__(self): {end}
fine, ends = 1, Ends()
""")
    with pytest.raises(SaveFailed, match=r"the process that saves .* at the variable 'ends'"):
        interpreter.save(file)
    assert not file.exists()
    interpreter.execute("del ends")
    assert "fine" in interpreter.save(file).saved


def test_a_payload_that_is_none_or_ends_the_session_is_told_apart(
    alive: SandboxInterpreter, file: Path, make: Make
) -> None:
    for payload in (b"", b"no pickle at all", b"\x80\x05N.\x80\x05N.", b"\x80\x05N.\x80\x05]q\x00."):
        rewrite(file, lambda header: None, payload=payload)
        with pytest.raises(RestoreFailed, match="the session is as it was"):
            alive.restore(file)
    other = make()
    rewrite(file, lambda header: None, payload=b"cos\n_exit\n(I3\ntR.")
    with pytest.raises(SessionLost, match=r"exited\(3\)"):
        other.restore(file)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 10 * CHUNK_BYTES])
def test_a_value_of_any_size_arrives(make: Make, file: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("host_client.saving.CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr("host_client.saved_file._CHUNK_BYTES", CHUNK_BYTES)
    restored = moved(
        make, f"b, t, a = bytes(range(256)) * {size // 256} + bytes({size % 256}), 'é' * {size}, [0.5] * {size}", file
    )
    assert restored.execute("[len(b), b[:256] == bytes(range(256))[:len(b)], t.count('é'), sum(a)]") == [
        *(size, size >= 256 or size <= 1, size, size / 2)
    ]
