"""Claims about files that go into a session and come out of it, with real workers."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from host_client import FileRefused, SandboxInterpreter, SessionBusy, SessionLost
from tests.tools.conftest import Make

#: Steps of this size make small files take several.
CHUNK_BYTES = 1000
SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 7]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("host_client.files.CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture
def interpreter(make: Make) -> SandboxInterpreter:
    return make()


def tree(root: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("size", SIZES)
def test_a_file_goes_in_and_out_unchanged(interpreter: SandboxInterpreter, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "in").write_bytes(content)
    interpreter.files.put(tmp_path / "in", "data/file.bin")
    assert interpreter.execute("len(open('data/file.bin', 'rb').read())") == size
    interpreter.files.get("data/file.bin", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content
    assert interpreter.files.read("./data//file.bin") == content
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]  # nothing unfinished is left


def test_a_folder_goes_in_and_out_with_empty_folders_and_odd_names(
    interpreter: SandboxInterpreter, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    (source / "a" / "b").mkdir(parents=True)
    (source / "empty").mkdir()
    (source / "a" / "naïve file.txt").write_text("x")
    (source / "a" / "b" / "run.sh").write_text("exit 3")
    (source / "a" / "b" / "run.sh").chmod(0o755)
    for number in range(50):
        (source / f"{number}").write_text(str(number))
    interpreter.files.put(source)
    assert interpreter.execute("import subprocess\nsubprocess.run(['sh', '-c', 'source/a/b/run.sh']).returncode") == 3
    interpreter.files.get("source", tmp_path / "target")
    assert tree(tmp_path / "target") == tree(source)
    assert not (tmp_path / "target/a/b/run.sh").stat().st_mode & stat.S_IXUSR  # what comes out is data


def test_the_list_tells_what_there_is(interpreter: SandboxInterpreter) -> None:
    interpreter.execute("import os\nos.makedirs('d/e'); open('d/e/f', 'w').write('abc'); os.symlink('/', 'd/link')")
    interpreter.execute("os.mkfifo('d/pipe')")
    assert [(entry.path, entry.kind, entry.size_bytes) for entry in interpreter.files.list("d")] == [
        ("e", "folder", 0),
        ("link", "link", 0),
        ("pipe", "other", 0),
        ("e/f", "file", 3),
    ]
    assert [entry.path for entry in interpreter.files.list("d/e/f")] == ["f"]
    assert "d" in [entry.path for entry in interpreter.files.list()]


def test_a_file_that_is_there_is_replaced_on_both_sides(interpreter: SandboxInterpreter, tmp_path: Path) -> None:
    for text in ("one, longer", "two"):
        (tmp_path / "in").write_text(text)
        interpreter.files.put(tmp_path / "in", "x")
        interpreter.files.get("x", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "two"


def test_namespace_and_last_result_stay_as_they_are(interpreter: SandboxInterpreter, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("x")
    before = interpreter.execute("x = 1\nsorted(globals())")
    last = interpreter.last_result
    interpreter.files.put(tmp_path / "in", "in")
    interpreter.files.list()
    with pytest.raises(FileRefused):
        interpreter.files.read("nothing")
    assert interpreter.last_result is last
    assert interpreter.execute("sorted(globals())") == before


def test_it_works_whatever_code_did_to_names_and_to_the_working_folder(
    interpreter: SandboxInterpreter, tmp_path: Path
) -> None:
    (tmp_path / "in").write_text("x")
    interpreter.execute(
        "import os; os.chdir('/')\nexec = eval = open = os = __import__ = globals = bytes = list = None"
    )
    interpreter.files.put(tmp_path / "in", "in")
    assert interpreter.files.read("in") == b"x"
    assert interpreter.execute("exec is None and __import__ is None") is True


def test_while_code_runs_it_is_refused(make: Make, tmp_path: Path) -> None:
    inside, go = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        go.wait(10)

    interpreter = make(tools=[wait])
    thread = threading.Thread(target=interpreter.execute, args=("wait()",))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(SessionBusy):
        interpreter.files.list()
    go.set()
    thread.join()
    assert isinstance(interpreter.files.list(), list)


@pytest.mark.parametrize(
    "path", ["", "..", "../x", "a/../../x", "/etc/passwd", "/", "/tmpx/y", "a\0b", "/tmp/../etc/passwd", "x" * 5000]
)
def test_a_path_that_leaves_the_session_is_refused_before_anything_runs(
    interpreter: SandboxInterpreter, tmp_path: Path, path: str
) -> None:
    (tmp_path / "in").write_text("x")
    with pytest.raises(FileRefused) as caught:
        interpreter.files.put(tmp_path / "in", path)
    assert caught.value.path in (path, path[:500])
    for use in (interpreter.files.list, interpreter.files.read, lambda p: interpreter.files.get(p, tmp_path / "out")):
        with pytest.raises(FileRefused):
            use(path)
    assert interpreter.session_id is None


def test_links_and_devices_of_the_session_are_refused_by_name(interpreter: SandboxInterpreter, tmp_path: Path) -> None:
    interpreter.execute(
        "import os\nos.mkdir('d'); os.symlink('/etc/passwd', 'd/passwd'); os.symlink('/etc', 'etc')\n"
        "os.mkdir('e'); os.mkfifo('e/pipe')"
    )
    for path, named in [
        ("d", "d/passwd"),
        ("d/passwd", "d/passwd"),
        ("etc", "etc"),
        ("e", "e/pipe"),
        ("e/pipe", "e/pipe"),
    ]:
        with pytest.raises(FileRefused) as caught:
            interpreter.files.get(path, tmp_path / "out")
        assert caught.value.path == named
    with pytest.raises(FileRefused):
        interpreter.files.read("d/passwd")
    with pytest.raises(FileRefused):
        interpreter.files.read("e/pipe")
    assert os.listdir(tmp_path) == []


def test_links_and_devices_of_the_host_are_refused_by_name(interpreter: SandboxInterpreter, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "passwd").symlink_to("/etc/passwd")
    (tmp_path / "e").mkdir()
    os.mkfifo(tmp_path / "e" / "pipe")
    for path, named in [("d", "d/passwd"), ("e", "e/pipe"), ("e/pipe", "e/pipe"), ("nothing", "nothing")]:
        with pytest.raises(FileRefused) as caught:
            interpreter.files.put(tmp_path / path)
        assert caught.value.path == str(tmp_path / named)
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    interpreter.files.put(tmp_path / "link")  # the user named this one
    assert interpreter.files.read("link") == b"x"


def test_a_link_at_the_target_is_replaced_and_never_followed(interpreter: SandboxInterpreter, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").symlink_to("precious")
    (tmp_path / "in").write_text("x")
    interpreter.files.put(tmp_path / "in", "x")
    interpreter.files.get("x", tmp_path / "out")
    assert ((tmp_path / "out").read_text(), (tmp_path / "out").is_symlink()) == ("x", False)
    assert (tmp_path / "precious").read_text() == "precious"
    interpreter.execute("import os\nopen('mine', 'w').write('mine'); os.symlink('mine', 'link')")
    interpreter.files.put(tmp_path / "in", "link")
    assert interpreter.execute("open('mine').read() + open('link').read()") == "minex"


def test_a_folder_in_the_way_is_refused_and_left(interpreter: SandboxInterpreter, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("x")
    (tmp_path / "folder").mkdir()
    interpreter.files.put(tmp_path / "folder", "folder")
    with pytest.raises(FileRefused, match="a folder of that name"):
        interpreter.files.put(tmp_path / "in", "folder")
    interpreter.files.put(tmp_path / "in", "x")
    with pytest.raises(FileRefused, match="there is a folder"):
        interpreter.files.get("x", tmp_path / "folder")
    with pytest.raises(FileRefused, match="there is a file"):
        interpreter.files.get("folder", tmp_path / "in")
    with pytest.raises(FileRefused, match="No such file"):
        interpreter.files.get("x", tmp_path / "not" / "there")
    assert sorted(os.listdir(tmp_path)) == ["folder", "in"]


def test_too_much_is_refused_on_both_sides(interpreter: SandboxInterpreter, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(1001))
    with pytest.raises(FileRefused, match="more than 1,000 bytes"):
        interpreter.files.put(tmp_path / "in", "in", max_bytes=1000)
    interpreter.files.put(tmp_path / "in", "in", max_bytes=1001)
    for get in (interpreter.files.get, lambda path, to, max_bytes: interpreter.files.read(path, max_bytes=max_bytes)):
        with pytest.raises(FileRefused, match="more than 1,000 bytes"):
            get("in", tmp_path / "out", max_bytes=1000)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_over_there_is_told_and_leaves_no_rest(interpreter: SandboxInterpreter, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(2000))
    interpreter.execute(
        "import os, resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"
    )
    with pytest.raises(FileRefused, match="File too large"):
        interpreter.files.put(tmp_path / "in", "in")
    assert interpreter.files.list() == []


def test_a_session_that_dies_meanwhile_is_lost(interpreter: SandboxInterpreter) -> None:
    interpreter.execute("import os\nfrom broker.worker import files\nfiles.os.lstat = lambda *a, **k: os._exit(3)")
    with pytest.raises(SessionLost) as caught:
        interpreter.files.list()
    assert caught.value.reason == "exited(3)"
    with pytest.raises(SessionLost):
        interpreter.files.list()


def test_secrets_are_masked_even_across_two_steps(make: Make, tmp_path: Path) -> None:
    interpreter = make(secrets={"API_KEY": "open-sesame-123"})
    interpreter.execute(
        f"import os\nkey = os.environ['API_KEY']\nopen('f', 'w').write('x' * ({CHUNK_BYTES} - 5) + key + 'end')"
    )
    interpreter.files.get("f", tmp_path / "f")
    for content in ((tmp_path / "f").read_bytes(), interpreter.files.read("f")):
        assert content.endswith(b"xx[secret API_KEY]end")
        assert b"sesame" not in content


def test_too_many_files_are_refused_on_both_sides(
    interpreter: SandboxInterpreter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host_client.files.MAX_ENTRIES", 3)
    interpreter.execute("import os\nos.mkdir('d')\nfor i in range(4): open(f'd/{i}', 'w').close()")
    (tmp_path / "d").mkdir()
    for number in range(3):
        (tmp_path / "d" / f"{number}").write_text("")
    for use in (lambda: interpreter.files.list("d"), lambda: interpreter.files.get("d", tmp_path / "out")):
        with pytest.raises(FileRefused, match="more than 3 files and folders"):
            use()
    with pytest.raises(FileRefused, match="more than 3 files and folders"):
        interpreter.files.put(tmp_path / "d", "e")
    assert interpreter.execute("os.remove('d/3'); sorted(os.listdir())") == ["d"]
    assert len(interpreter.files.list("d")) == 3
