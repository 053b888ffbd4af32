"""The import rules of DESIGN.md, held by reading every module's imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What the broker's daemon may use beyond the standard library.
_BROKER_PACKAGES = {"flask", "werkzeug", "gevent", "greenlet"}
# What each of these may import of ours; the rest is the standard library.
_STANDARD_LIBRARY_ONLY = {
    "broker.protocol": ("broker.protocol",),
    "broker.worker": ("broker.worker", "broker.protocol"),
    # The worker is a fork of the supervisor.
    "broker.supervisor": ("broker.supervisor", "broker.worker", "broker.protocol"),
}
# Arrays and tables are built where these can be imported, and only in the function that builds them.
_OPTIONAL = {
    "broker.protocol.values": {"numpy", "pandas"},
    "broker.protocol.fast_json": {"orjson"},
    "broker.worker.durable.pickling": {"cloudpickle"},
    "broker.worker.durable.restorer": {"cloudpickle"},
}


def modules(package: str) -> dict[str, Path]:
    """Return module names and files of a package of this project."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """Yield the full name of everything that a module imports, inside functions too."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
                base = ".".join([*parents, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    """Say whether a dotted name is one of these packages or below one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def importers(package: str, wanted: str) -> set[str]:
    """Return the modules of a package that import something."""
    return {name for name, path in modules(package).items() if any(within(i, wanted) for i in imports(name, path))}


def test_the_reader_of_imports_sees_nested_relative_and_plain_ones(tmp_path: Path) -> None:
    source = tmp_path / "m.py"
    source.write_text("import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n")
    assert set(imports("x.y.m", source)) == {"a.b", "c", "c.d", "x.y", "x.y.e", "x.g", "x.g.h"}


def test_the_broker_never_imports_the_host() -> None:
    assert importers("broker", "host_client") == set()
    assert importers("broker", "sandbox_image") == set()


def test_the_host_takes_only_the_protocol_from_the_broker() -> None:
    # The package itself is looked at for its version and for whether it is ours.
    allowed_of_the_package = {"broker.RLM_SANDBOX_BROKER", "broker.__version__"}
    for name, path in modules("host_client").items():
        taken = {i for i in imports(name, path) if within(i, "broker")}
        taken -= {"broker"} | allowed_of_the_package
        assert {i for i in taken if not within(i, "broker.protocol")} == set(), name


@pytest.mark.parametrize("package", _STANDARD_LIBRARY_ONLY)
def test_what_shares_a_process_with_generated_code_is_standard_library(package: str) -> None:
    for name, path in modules("broker").items():
        if not within(name, package):
            continue
        for imported in imports(name, path):
            root = imported.partition(".")[0]
            # The package itself is only the way to its parts.
            ours = imported == "broker" or within(imported, *_STANDARD_LIBRARY_ONLY[package])
            known = root in sys.stdlib_module_names or root in _OPTIONAL.get(name, ())
            assert ours or known, f"{name} imports {imported}"


def test_the_broker_imports_flask_its_server_and_nothing_else() -> None:
    for name, path in modules("broker").items():
        roots = {imported.partition(".")[0] for imported in imports(name, path)}
        allowed = {"broker"} | _BROKER_PACKAGES | _OPTIONAL.get(name, set())
        assert roots - set(sys.stdlib_module_names) <= allowed, name


def test_optional_packages_are_never_imported_by_a_module_as_a_whole() -> None:
    for name, packages in _OPTIONAL.items():
        path = modules("broker")[name]
        tree = ast.parse(path.read_text("utf-8"))
        at_import = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
        assert not packages & {n.name for i in ast.walk(at_import) if isinstance(i, ast.Import) for n in i.names}, name


def test_the_docker_sdk_has_one_home() -> None:
    assert importers("host_client", "docker") == {"host_client.providers.docker_engine"}


def test_the_http_library_has_at_most_one_home() -> None:
    users = importers("host_client", "requests") | importers("host_client", "urllib3")
    # The demo speaks to models as a user's program would.
    assert len({name for name in users if not within(name, "host_client.demo")}) <= 1, users


def test_dspy_is_imported_where_it_is_adapted_and_in_the_demo_only() -> None:
    for name in importers("host_client", "dspy"):
        assert within(name, "host_client.dspy_compat", "host_client.history.dspy_parts", "host_client.demo"), name


def test_importing_the_package_imports_neither_dspy_nor_the_docker_sdk() -> None:
    code = "import sys, host_client; print(*{'dspy', 'docker', 'requests', 'flask', 'gevent'} & set(sys.modules))"
    # Coverage would import gevent into the child, to follow its greenlets.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert done.stdout.strip() == ""


def test_the_image_s_folder_is_data() -> None:
    for name, path in modules("sandbox_image").items():
        tree = ast.parse(path.read_text("utf-8"))
        assert all(isinstance(node, ast.Expr) for node in tree.body), name


def test_nothing_imports_the_tests() -> None:
    for package in ("broker", "host_client"):
        assert importers(package, "tests") == set()
