"""The limits and the isolation of a real container, as the engine tells them and as they are felt inside."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host_client.providers.base import SandboxHandle
from host_client.providers.docker import DockerProvider
from host_client.providers.docker_engine import DockerEngine
from host_client.runtime_dir import RuntimeDir
from host_client.settings import SandboxSettings
from tests.docker.sandboxes import engine, image, runtime

pytestmark = pytest.mark.docker

__all__ = ["engine", "image", "runtime"]

#: CAP_KILL, CAP_SETGID, CAP_SETUID and CAP_SETPCAP are bits 5 to 8.
SUPERVISORS_CAPABILITIES = 0b1_1110_0000
ZYGOTES_CAPABILITIES = 0b1_1100_0000  # without KILL


class Inside:
    """Runs commands in a sandbox as one of its guests."""

    def __init__(self, engine: DockerEngine, handle: SandboxHandle) -> None:
        self._client = engine._quick
        self._handle = handle
        self.details = engine.inspect(handle.sandbox_id)
        self.config = json.loads(self.details["Args"][-1])

    def run(self, script: str) -> str:
        uid = self.config["guest_uid_base"]
        made = self._client.exec_create(self._handle.sandbox_id, ["python3", "-c", script], user=f"{uid}:{uid}")
        output = bytes(self._client.exec_start(made["Id"])).decode()
        assert self._client.exec_inspect(made["Id"])["ExitCode"] == 0, output
        return output.strip()

    def read(self, path: str) -> str:
        return self.run(f"print(open({path!r}).read(), end='')")

    def errno_of(self, statement: str) -> str:
        """Name of the errno with which a statement fails, or what shows that it did not."""
        return self.run(
            "import errno, os, socket\n"
            f"try:\n {statement}\n"
            "except OSError as error:\n print(errno.errorcode[error.errno])\n"
            "else:\n print('it worked')"
        )


@pytest.fixture(scope="module")
def inside(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """One sandbox for all tests here: they only look."""
    # A canary in each place from which an engine's client copies things into containers.
    docker_config = tmp_path_factory.mktemp("docker")
    proxies: dict[str, Any] = {"proxies": {"default": {"httpProxy": "http://user:canary@proxy.invalid:1"}}}
    (docker_config / "config.json").write_text(json.dumps(proxies))
    settings = SandboxSettings(image=image, memory="512m", cpus=1, pids=300, tmpfs="32m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", str(docker_config))
        patch.setenv("HOST_CANARY", "canary")
        provider = DockerProvider()
        handle = provider.start(settings)
        with DockerEngine.connect() as connected:
            yield Inside(connected, handle)
        provider.stop(handle)


def status_field(inside: Inside, pid: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*(\S+)", inside.read(f"/proc/{pid}/status"), re.MULTILINE)
    assert match is not None
    return match[1]


def test_only_pid_1_has_capabilities_and_only_four(inside: Inside) -> None:
    assert int(status_field(inside, "1", "CapEff"), 16) == SUPERVISORS_CAPABILITIES
    assert int(status_field(inside, "1", "CapBnd"), 16) == SUPERVISORS_CAPABILITIES
    assert int(status_field(inside, "self", "CapEff"), 16) == 0


def test_nobody_can_gain_privileges_and_system_calls_are_filtered(inside: Inside) -> None:
    for pid in ("1", "self"):
        assert status_field(inside, pid, "NoNewPrivs") == "1"
        assert status_field(inside, pid, "Seccomp") == "2"


def test_the_broker_runs_under_its_own_uid_without_capabilities(inside: Inside) -> None:
    script = (
        "import os\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        " text = open(f'/proc/{pid}/status').read()\n"
        " fields = dict(line.split(':', 1) for line in text.splitlines() if ':' in line)\n"
        " print(pid, fields['Uid'].split()[1], int(fields['CapEff'], 16))"
    )
    processes = [line.split() for line in inside.run(script).splitlines()]
    assert ["1", "0", str(SUPERVISORS_CAPABILITIES)] in processes
    others = [(uid, capabilities) for pid, uid, capabilities in processes if pid != "1"]
    assert (str(inside.config["broker_uid"]), "0") in others
    others.remove(("0", str(ZYGOTES_CAPABILITIES)))
    assert all(uid != "0" and capabilities == "0" for uid, capabilities in others)


def test_there_is_no_network(inside: Inside) -> None:
    interfaces = re.findall(r"^\s*(\S+):", inside.read("/proc/net/dev"), re.MULTILINE)
    assert [name for name in interfaces if name != "lo"] in ([], ["tunl0"])
    assert inside.errno_of("socket.create_connection(('192.0.2.1', 80), 2)") == "EPERM"


def test_the_root_is_read_only_and_tmp_is_not(inside: Inside) -> None:
    mounts = [line.split() for line in inside.read("/proc/self/mounts").splitlines()]
    [root] = [options.split(",") for _, target, _, options, *_ in mounts if target == "/"]
    assert "ro" in root
    assert inside.errno_of("open('/tmp/canary', 'w').close()") == "it worked"
    for path in ("/etc/canary", "/opt/rlm-sandbox/canary", "/run/canary", "/run/rlm-sandbox/guest/canary"):
        assert inside.errno_of(f"open({path!r}, 'w')") in ("EROFS", "EACCES")


def test_the_only_mount_of_ours_is_the_sockets_directory_and_guests_cannot_enter_it(inside: Inside) -> None:
    [mount] = inside.details["Mounts"]
    assert (mount["Type"], mount["Destination"]) == ("bind", "/run/rlm-sandbox/host")
    assert inside.errno_of("os.listdir('/run/rlm-sandbox/host')") == "EACCES"
    assert inside.errno_of("os.stat('/run/rlm-sandbox/host/host.sock')") == "EACCES"
    assert inside.errno_of("os.listdir('/run/rlm-sandbox/guest')") == "EACCES"
    assert inside.errno_of("os.stat('/run/rlm-sandbox/guest/guest.sock')") == "it worked"


def test_tmp_is_bounded_in_size_and_inodes_and_lets_nothing_gain_privileges(inside: Inside) -> None:
    script = "import os; v = os.statvfs('/tmp'); print(v.f_blocks * v.f_frsize, v.f_files)"
    assert inside.run(script).split() == [str(32 << 20), str(8192)]
    [options] = [
        options.split(",")
        for _, target, _, options, *_ in (line.split() for line in inside.read("/proc/self/mounts").splitlines())
        if target == "/tmp"
    ]
    assert {"nosuid", "nodev"} <= set(options)
    assert "noexec" not in options, "wheels with native code may be unpacked there"


def test_shared_memory_is_bounded(inside: Inside) -> None:
    script = "import os; v = os.statvfs('/dev/shm'); print(v.f_blocks * v.f_frsize)"
    assert inside.run(script) == str(64 << 20)


def test_memory_cpu_and_processes_are_limited_as_the_settings_say(inside: Inside) -> None:
    host = inside.details["HostConfig"]
    assert host["Memory"] == host["MemorySwap"] == 512 << 20
    assert host["NanoCpus"] == 10**9
    assert host["PidsLimit"] == 300
    limits = {name: Path("/sys/fs/cgroup", *rest) for name, rest in CGROUP_FILES.items()}
    present = {name: inside.read(str(path)).split()[0] for name, path in limits.items() if _is_there(inside, path)}
    assert present in (
        {"memory v2": str(512 << 20), "swap v2": "0", "pids v2": "300"},
        {"memory v1": str(512 << 20), "pids v1": "300"},
    )


CGROUP_FILES = {
    "memory v2": ["memory.max"],
    "swap v2": ["memory.swap.max"],
    "pids v2": ["pids.max"],
    "memory v1": ["memory", "memory.limit_in_bytes"],
    "pids v1": ["pids", "pids.max"],
}


def _is_there(inside: Inside, path: Path) -> bool:
    return inside.run(f"import os; print(os.path.exists({str(path)!r}))") == "True"


def test_open_files_are_limited_and_no_core_is_written(inside: Inside) -> None:
    script = "import resource as r; print(r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CORE))"
    assert inside.run(script) == "(16384, 16384) (0, 0)"


def test_nothing_of_the_hosts_environment_or_proxy_settings_is_inside(inside: Inside) -> None:
    assert "canary" not in json.dumps(inside.details["Config"])
    assert "canary" not in inside.run("import os; print(dict(os.environ))")


def test_the_log_cannot_fill_the_disk_and_nothing_restarts_by_itself(inside: Inside) -> None:
    host = inside.details["HostConfig"]
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "1m", "max-file": "1"}}
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["IpcMode"] == "private"
    assert host["CgroupnsMode"] == "private"
    assert not host["Privileged"]


def test_the_labels_say_whose_it_is(inside: Inside) -> None:
    labels = inside.details["Config"]["Labels"]
    assert labels["rlm-sandbox"] == "1"
    assert labels["rlm-sandbox.host-uid"] == str(os.geteuid())
    boot_id, pid, ticks, _ = labels["rlm-sandbox.owner"].split(":")
    assert boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert pid == str(os.getpid())
    assert ticks == Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]


def test_the_host_name_says_nothing_about_the_host(inside: Inside) -> None:
    assert inside.run("import socket; print(socket.gethostname())") == "sandbox"


def test_the_directory_on_the_host_is_the_brokers_alone(runtime: RuntimeDir, image: str) -> None:
    provider = DockerProvider()
    handle = provider.start(SandboxSettings(image=image))
    try:
        found = handle.socket_path.parent.stat()
        assert found.st_mode & 0o777 == 0o700
        assert found.st_uid == (os.geteuid() or 19_999)
    finally:
        provider.stop(handle)
