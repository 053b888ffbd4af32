"""Claims about the image: its tag, its base, its packages and its build."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

import broker
import sandbox_image
from host_client import base_image, image, wheels
from host_client.base_image import BOOTSTRAPPED, OFFICIAL, ensure_base
from host_client.engine import connect_engine
from host_client.errors import DiskFull, EngineUnavailable, ImageBuildFailed, ImageMissing, SetupError
from host_client.image import ensure_image, image_exists, image_tag, remove_images
from host_client.machine import Machine
from host_client.settings import SandboxSettings
from host_client.wheels import ensure_site, read_requirements

SETTINGS = SandboxSettings()


class FakeEngine:
    """An engine with images and, perhaps, a registry."""

    def __init__(self, *tags: str, registry: Sequence[str] = (), build_error: Exception | None = None) -> None:
        self.tags = list(tags)
        self.registry = registry
        self.build_error = build_error
        self.context: dict[str, tarfile.TarInfo] = {}
        self.buildargs: Mapping[str, str] = {}
        self.imported = 0

    def image_exists(self, tag: str) -> bool:
        return tag in self.tags

    def images(self, repository: str) -> list[str]:
        return [tag for tag in self.tags if tag.startswith(repository + ":")]

    def remove_image(self, tag: str, force: bool = True) -> None:
        self.tags.remove(tag)

    def registry_has(self, tag: str, timeout_s: float) -> bool:
        return tag in self.registry

    def version(self) -> dict[str, Any]:
        return {"Arch": "amd64"}

    def pull(self, tag: str) -> Iterator[str]:
        yield "Pulling fs layer"
        self.tags.append(tag)
        yield "Status: Downloaded newer image"

    def build(self, context: IO[bytes], *, tag: str, buildargs: Mapping[str, str]) -> Iterator[str]:
        with tarfile.open(fileobj=context) as archive:
            self.context = {entry.name: entry for entry in archive}
        self.buildargs = buildargs
        yield "Step 1/9 : ARG BASE"
        if self.build_error:
            raise self.build_error
        self.tags.insert(0, tag)

    def import_image(self, tarball: IO[bytes], *, tag: str, changes: Iterable[str] = ()) -> None:
        self.imported = len(tarball.read())
        self.tags.append(tag)


class FakeHost(Machine):
    """A machine with a few programs."""

    def __init__(self, *programs: str, root: bool = True, debian: bool = True) -> None:
        self.programs, self.root, self.debian = list(programs), root, debian

    def is_root(self) -> bool:
        return self.root

    def is_debian(self) -> bool:
        return self.debian

    def which(self, program: str) -> str | None:
        return program if program in self.programs else None

    def run(self, argv: Sequence[str], *, timeout_s: float) -> tuple[int, str]:
        self.programs.append("debootstrap")
        return 0, ""


def as_engine(fake: FakeEngine) -> Any:
    return fake


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the image at small packages of its own."""
    for package in (broker, sandbox_image):
        folder = tmp_path / package.__name__
        (folder / "worker").mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "worker" / "repl.py").write_text("1\n")
        monkeypatch.setattr(package, "__file__", str(folder / "__init__.py"))
    for name in ("Dockerfile", "requirements-guest.txt", "requirements-broker.txt"):
        (tmp_path / "sandbox_image" / name).write_text("# nothing\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_tag_changes_with_any_source_and_with_nothing_else(sources: Path) -> None:
    before = image_tag(SETTINGS)
    cache = sources / "broker" / "__pycache__"
    cache.mkdir()
    (cache / "x.pyc").write_bytes(b"x")
    (sources / "broker" / ".swp").write_text("an editor's")
    assert image_tag(SETTINGS) == before
    (sources / "broker" / "worker" / "repl.py").write_text("2\n")
    changed = image_tag(SETTINGS)
    (sources / "broker" / "worker" / "repl.py").rename(sources / "broker" / "worker" / "other.py")
    assert len({before, changed, image_tag(SETTINGS)}) == 3
    assert before.startswith("rlm-sandbox:")


def test_the_tag_depends_on_extra_packages_but_not_on_their_order(sources: Path) -> None:
    tags = {image_tag(SandboxSettings(packages=packages)) for packages in [(), ("a",), ("a", "b"), ("b", "a")]}
    assert len(tags) == 3


def test_an_image_that_is_there_is_not_built(sources: Path) -> None:
    engine, said = FakeEngine(image_tag(SETTINGS)), list[str]()
    assert ensure_image(SETTINGS, said.append, engine=as_engine(engine)) == image_tag(SETTINGS)
    assert image_exists(SETTINGS, engine=as_engine(engine))
    assert (engine.context, said) == ({}, [])


def test_the_user_s_own_image_is_never_built(sources: Path) -> None:
    settings = SandboxSettings(image="mine:1")
    assert image_tag(settings) == "mine:1"
    with pytest.raises(ImageMissing, match="mine:1"):
        ensure_image(settings, print, engine=as_engine(FakeEngine()))


def test_everything_in_the_build_context_is_root_s_and_read_only(sources: Path) -> None:
    engine, said = FakeEngine(BOOTSTRAPPED), list[str]()
    tag = ensure_image(SETTINGS, said.append, engine=as_engine(engine))
    assert tag in engine.tags
    assert engine.buildargs == {"BASE": BOOTSTRAPPED}
    assert {"Dockerfile", "broker/worker/repl.py", "broker-site", "guest-site"} <= set(engine.context)
    for entry in engine.context.values():
        assert (entry.uid, entry.gid, entry.mtime, entry.mode & 0o222) == (0, 0, 0, 0)


def test_a_failed_build_shows_the_end_of_its_log(sources: Path) -> None:
    engine = FakeEngine(OFFICIAL, build_error=ImageBuildFailed("returned a non-zero code: 1"))
    with pytest.raises(ImageBuildFailed, match=r"Step 1/9") as caught:
        ensure_image(SETTINGS, print, engine=as_engine(engine))
    assert "non-zero" in str(caught.value)


def test_sources_that_change_during_the_build_are_noticed(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(*_: object, **__: object) -> None:
        (sources / "broker" / "worker" / "repl.py").write_text("changed\n")

    monkeypatch.setattr(image, "_write_context", change)
    with pytest.raises(ImageBuildFailed, match="changed while"):
        ensure_image(SETTINGS, print, engine=as_engine(FakeEngine(OFFICIAL)))


def test_old_images_go_and_the_newest_stay(sources: Path) -> None:
    old = [f"rlm-sandbox:{n}" for n in range(10)]
    engine = FakeEngine(OFFICIAL, *old)
    tag = ensure_image(SETTINGS, print, engine=as_engine(engine))
    assert engine.images("rlm-sandbox") == [tag, *old[:5]]


def test_clean_removes_our_images_only() -> None:
    engine = FakeEngine("rlm-sandbox:a", BOOTSTRAPPED, OFFICIAL, "rlm-sandbox-other:1")
    assert remove_images(as_engine(engine)) == ["rlm-sandbox:a", BOOTSTRAPPED]
    assert engine.tags == [OFFICIAL, "rlm-sandbox-other:1"]


# The base.


@pytest.mark.parametrize("tag", [OFFICIAL, BOOTSTRAPPED])
def test_a_base_that_is_here_is_used_without_asking_a_registry(tag: str) -> None:
    assert ensure_base(as_engine(FakeEngine(tag)), print) == tag


def test_the_official_base_is_pulled_where_a_registry_has_it() -> None:
    engine = FakeEngine(registry=[OFFICIAL])
    assert ensure_base(as_engine(engine), print) == OFFICIAL
    assert engine.tags == [OFFICIAL]


def test_without_a_registry_the_base_is_bootstrapped_and_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def bootstrap(argv: list[str], report: object) -> tuple[int, str]:
        root = Path(argv[argv.index("trixie") + 1])
        (root / "usr").mkdir(parents=True)
        return 0, ""

    monkeypatch.setattr(base_image, "watch", bootstrap)
    engine, said = FakeEngine(), list[str]()
    assert ensure_base(as_engine(engine), said.append, machine=FakeHost()) == BOOTSTRAPPED
    assert engine.imported > 0
    assert any("installing debootstrap" in line for line in said)


def test_a_failed_bootstrap_names_the_mirror_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_image, "watch", lambda *_: (1, "E: Couldn't download packages"))
    with pytest.raises(ImageBuildFailed, match="Couldn't download") as caught:
        ensure_base(as_engine(FakeEngine()), print, machine=FakeHost("debootstrap"))
    assert "RLM_SANDBOX_DEBIAN_MIRROR" in str(caught.value)


@pytest.mark.parametrize(
    ("host", "words"), [(FakeHost(root=False), "sudo "), (FakeHost(debian=False), "Install debootstrap")]
)
def test_who_cannot_make_a_base_is_told_what_can(host: FakeHost, words: str) -> None:
    with pytest.raises(SetupError, match=words):
        ensure_base(as_engine(FakeEngine()), print, machine=host)


def test_a_long_program_s_newest_line_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_image, "_REPORT_EVERY_S", 0.0)
    said: list[str] = []
    status, output = base_image.watch(["sh", "-c", "echo I: one; echo two; exit 4"], lambda line, _: said.append(line))
    assert (status, output, said) == (4, "I: one\ntwo", ["one", "two"])


# Packages.


class FakePip:
    """Installs by making one file for each requirement."""

    def __init__(self, status: int = 0, output: str = "") -> None:
        self.status, self.output = status, output
        self.calls: list[list[str]] = []

    def __call__(self, arguments: Sequence[str]) -> tuple[int, str]:
        self.calls.append(list(arguments))
        target = Path(next(a for a in arguments if a.startswith("--target=")).partition("=")[2])
        (target / "numpy" / "core" / "tests").mkdir(parents=True)
        (target / "numpy" / "testing").mkdir()
        (target / "bin").mkdir()
        return self.status, self.output


def test_wheels_are_fetched_once_for_the_engine_s_architecture(tmp_path: Path) -> None:
    pip = FakePip()
    sites = [ensure_site("guest-site", ["numpy==2"], "arm64", print, fetch=pip, cache=tmp_path) for _ in range(2)]
    assert sites[0] == sites[1]
    assert len(pip.calls) == 1
    assert "--platform=manylinux_2_28_aarch64" in pip.calls[0]
    assert "--python-version=3.13" in pip.calls[0]


def test_programs_and_tests_of_packages_are_left_out_but_not_numpy_testing(tmp_path: Path) -> None:
    site = ensure_site("guest-site", ["numpy==2"], "amd64", print, fetch=FakePip(), cache=tmp_path)
    assert sorted(str(path.relative_to(site)) for path in site.rglob("*")) == ["numpy", "numpy/core", "numpy/testing"]


def test_another_set_of_packages_is_another_folder(tmp_path: Path) -> None:
    sites = {
        ensure_site("guest-site", requirements, "amd64", print, fetch=FakePip(), cache=tmp_path)
        for requirements in (["a"], ["a", "b"])
    }
    assert len(sites) == 2


def test_the_cache_of_packages_is_bounded(tmp_path: Path) -> None:
    for n in range(7):
        ensure_site("guest-site", [f"a=={n}"], "amd64", print, fetch=FakePip(), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_package_without_a_wheel_is_named_and_nothing_is_kept(tmp_path: Path) -> None:
    pip = FakePip(1, "WARNING: noise\nERROR: No matching distribution found for nonsense")
    with pytest.raises(ImageBuildFailed, match="No matching distribution found for nonsense") as caught:
        ensure_site("guest-site", ["nonsense"], "amd64", print, fetch=pip, cache=tmp_path)
    assert "noise" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_fetching_is_named_as_such(tmp_path: Path) -> None:
    pip = FakePip(1, "ERROR: [Errno 28] No space left on device")
    with pytest.raises(DiskFull):
        ensure_site("guest-site", ["a"], "amd64", print, fetch=pip, cache=tmp_path)


def test_an_architecture_that_we_do_not_build_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageBuildFailed, match="riscv64"):
        ensure_site("guest-site", ["a"], "riscv64", print, cache=tmp_path)


def test_the_shipped_requirements_are_pinned() -> None:
    folder = Path(sandbox_image.__file__).parent
    for name in ("requirements-broker.txt", "requirements-guest.txt"):
        found = read_requirements(folder / name)
        assert found
        assert all("==" in requirement for requirement in found)


def test_pip_of_this_environment_runs() -> None:
    status, output = wheels._pip(["--version"])
    assert status == 0
    assert output.startswith("pip ")


def test_without_any_pip_the_command_that_brings_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ImageBuildFailed, match="ensurepip"):
        wheels._pip(["--version"])


# On the real engine.


@pytest.mark.docker
def test_the_real_image_runs_python_313_with_its_packages_and_compiles_nothing() -> None:
    try:
        engine = connect_engine()
    except EngineUnavailable as error:
        pytest.skip(str(error))
    with engine:
        tag = ensure_image(SETTINGS, print, engine=engine)
        # Imported code that does not come from bytecode is named in -v's output as coming from a .py file.
        script = (
            "import sys; assert sys.version_info[:2] == (3, 13)\n"
            "sys.path.insert(0, '/opt/rlm-sandbox/guest-site')\n"
            "import asyncio, json, numpy, pandas\n"
            "print('mean', pandas.DataFrame({'a': numpy.arange(5)}).a.mean())\n"
        )
        container = engine.create_container(
            image=tag,
            entrypoint=["python3", "-v", "-c", script],
            network_mode="none",
            read_only=True,
            cap_drop=["ALL"],
            user="20000:20000",
        )
        try:
            engine.start(container)
            log = b"".join(engine.follow_logs(container, tail=100_000)).decode()
        finally:
            engine.remove(container)
    assert "mean 2.0" in log
    assert "# code object from /" not in log


def test_the_context_is_the_same_bytes_each_time(sources: Path) -> None:
    sites = [sources / "guest", sources / "site"]
    for site in sites:
        (site / "empty").mkdir(parents=True)
        (site / ".hidden").write_text("a library")
    written = []
    for _ in range(2):
        buffer = io.BytesIO()
        image._write_context(buffer, guest_site=sites[0], broker_site=sites[1])
        written.append(buffer.getvalue())
    assert written[0] == written[1]
    assert (
        subprocess.run(["tar", "-t"], input=written[0], capture_output=True, check=True).stdout.count(b".hidden") == 2
    )
