"""Claims about the distribution: the wheel is complete, and works outside this checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(argv: list[str], *, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program as from a user's shell: nothing of this checkout on Python's path."""
    environ = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(argv, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT)
    [built] = folder.glob("rlm_sandbox-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with the wheel in it.

    Its dependencies are those of this environment, behind a path file: the same files, without a minute of pip.
    """
    folder = tmp_path_factory.mktemp("env") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "pip", f"--python={python}", "install", "-qq", "--no-deps", str(wheel)], cwd=folder)
    site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).stdout.strip()
    # addsitedir would follow this environment's own path files, and with them its link to the checkout.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_the_wheel_carries_the_packages_and_what_the_image_is_made_from(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {"Dockerfile", "requirements-broker.txt", "requirements-guest.txt"}
    assert {f"sandbox_image/{name}" for name in data} <= names
    assert {"broker/__init__.py", "broker/protocol/__init__.py", "host_client/cli.py"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops - {"broker", "host_client", "sandbox_image"} == {next(t for t in tops if t.endswith(".dist-info"))}


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "broker", "host_client", "sandbox_image"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {line for line in listed.stdout.splitlines() if (ROOT / line).exists()} - names
    assert missing == set()


def test_the_command_runs_from_an_empty_folder(installed: Path, empty: Path) -> None:
    done = run([str(installed.parent / "rlm-sandbox"), "--help"], cwd=empty)
    assert "sandbox" in done.stdout
    assert run([str(installed.parent / "rlm-sandbox"), "--version"], cwd=empty).stdout.startswith("rlm-sandbox 0.")


def test_the_installed_package_finds_its_image_and_asks_for_the_same_one(installed: Path, empty: Path) -> None:
    code = (
        "import host_client.image as i; from host_client.settings import SandboxSettings as S;"
        "print(i.__file__); print(i.image_tag(S()))"
    )
    where, tag = run([str(installed), "-c", code], cwd=empty).stdout.split()
    assert not where.startswith(str(ROOT))
    assert re.fullmatch(r"rlm-sandbox:[0-9a-f]{12}", tag)


def test_a_foreign_package_named_broker_is_named_in_a_clear_error(installed: Path, empty: Path) -> None:
    (empty / "broker").mkdir()
    (empty / "broker" / "__init__.py").write_text("queue = None\n")
    done = run([str(installed), "-c", "import host_client"], cwd=empty, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert str(empty / "broker") in last
    assert "rlm-sandbox" in last


def test_an_error_of_ours_is_one_message_without_traceback(installed: Path, empty: Path) -> None:
    argv = ["env", f"DOCKER_HOST=unix://{empty}/none.sock", str(installed.parent / "rlm-sandbox"), "setup"]
    done = run(argv, cwd=empty, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No Docker engine answers")
    assert "Traceback" not in done.stderr


def test_make_help_lists_the_targets_of_the_documentation() -> None:
    done = run(["make", "--no-print-directory", "help"], cwd=ROOT)
    listed = re.findall(r"^  ([a-z-]+) +\S", done.stdout, re.MULTILINE)
    targets = "demo sandbox-up sandbox-down sandbox-status sandbox-logs image test check bench devsh clean"
    assert " ".join(listed) == targets


def test_versions_agree() -> None:
    import broker

    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'version = "{broker.__version__}"' in text


def test_no_machine_of_ours_is_named_in_the_packaging_files() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", "tools/make_venv.sh"):
        text = (ROOT / name).read_text("utf-8")
        assert not re.search(r"https?://|file://", text), name
