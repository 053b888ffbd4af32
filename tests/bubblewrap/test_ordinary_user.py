"""Claims about sandboxes of a user who has but one number: what keeps broker and session apart then."""

from __future__ import annotations

import json

from host_client.runtime_dir import RuntimeDir
from tests.bubblewrap.sandboxes import leaks, run_host

_LIMITS = {"memory", "swap", "processes and threads", "cores"}
_ATTEMPTS = {
    "memory of PID 1": "open('/proc/1/mem', 'rb')",
    "environment of PID 1": "open('/proc/1/environ', 'rb').read()",
    "descriptors of PID 1": "os.readlink('/proc/1/fd/0')",
    "memory of the zygote": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "environment of the zygote": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "descriptors of the zygote": "os.readlink(f'/proc/{os.getppid()}/fd/0')",
    "a signal to PID 1": "os.kill(1, 9) or os.kill(1, 0) or done",
    "the host's socket": "os.listdir('/run/rlm-sandbox/host')",
    "its own chance of survival": "open('/proc/self/oom_score_adj', 'w').write('0')",
    "files outside /tmp": "open('/opt/canary', 'w')",
    "a namespace": "ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == 0 or refused",
    "a program's rights": "os.setuid(0)",
}


def _report(code: str) -> dict[str, object]:
    """Run host code as an ordinary user; it fills ``report``."""
    prelude = "import dataclasses, json\nfrom host_client import SandboxInterpreter\nreport = {}\n"
    prelude += "lenient = dataclasses.replace(settings, insecure=True)\n"
    output = run_host(f"{prelude}{code}\nprint(json.dumps(report))", as_ordinary_user=True)
    found: dict[str, object] = json.loads(output.splitlines()[-1])
    return found


def test_without_control_groups_it_is_refused_and_nothing_but_limits_is_what_fails(runtime: RuntimeDir) -> None:
    report = _report("""
from host_client.bubblewrap import cgroups
from host_client.errors import SandboxTooWeak
cgroups._hierarchies = lambda _: (None, {})  # here, the files of the machine's groups are this user's
try:
    provider.start(settings)
except SandboxTooWeak as error:
    report['failed'] = [check.name for check in error.checks if not check.held]
    report['held'] = [check.name for check in error.checks if check.held]
""")
    failed, held = set(report["failed"]), set(report["held"])  # type: ignore[call-overload]
    assert failed <= _LIMITS
    assert "memory" in failed, "or this machine delegates, and the test says nothing"
    assert {"user", "broker", "broker's memory", "host's socket", "system call filter", "capabilities"} <= held
    assert leaks(runtime) == []


def test_generated_code_sees_neither_the_broker_nor_its_socket(runtime: RuntimeDir) -> None:
    report = _report(f"""
with SandboxInterpreter({{"double": lambda n: n * 2}}, settings=lenient, provider=provider) as made:
    report['value'] = made.execute("import ctypes, os\\ndouble(21)")
    report['pids'] = made.execute("{{*os.listdir('/proc')}} >= {{'1', str(os.getppid()), str(os.getpid())}}")
    report['processes'] = made.execute("sum(name.isdigit() for name in os.listdir('/proc'))")
    report['sockets'] = made.execute("os.listdir('/run/rlm-sandbox')")
    for name, code in {_ATTEMPTS!r}.items():
        try:
            report[name] = repr(made.execute(code))
        except Exception as error:
            report[name] = str(error).splitlines()[-1].split(':')[0]
""")
    assert report.pop("value") == 42
    assert report.pop("pids") is True
    assert report.pop("processes") == 3
    assert report.pop("sockets") == ["guest"]
    assert set(report) == set(_ATTEMPTS)
    allowed = {"PermissionError", "OSError", "FileNotFoundError", "NameError", "ProcessLookupError"}
    assert set(report.values()) <= allowed, report
    assert leaks(runtime) == []


def test_one_session_after_another_finds_nothing_of_the_one_before(runtime: RuntimeDir) -> None:
    report = _report("""
handle = provider.start(lenient, name='one')
with SandboxInterpreter(settings=lenient, provider=provider, sandbox='one') as first:
    first.execute("import os, subprocess\\nopen('/tmp/left', 'w').close(); open('/dev/shm/left', 'w').close()")
    first.execute("subprocess.Popen(['sleep', '1000'], start_new_session=True)")
    try:
        SandboxInterpreter(settings=lenient, provider=provider, sandbox='one').start()
    except Exception as error:
        report['second'] = type(error).__name__
with SandboxInterpreter(settings=lenient, provider=provider, sandbox='one') as second:
    report['files'] = second.execute("import os\\n[p for p in ('/tmp/left', '/dev/shm/left') if os.path.exists(p)]")
    report['pids'] = second.execute("sum(name.isdigit() for name in os.listdir('/proc'))")
provider.stop(handle)
""")
    assert report["files"] == []
    assert report["pids"] == 3, "PID 1, the zygote and itself"
    assert report["second"], "a second session at the same time is refused"
    assert leaks(runtime) == []


def test_a_session_that_stops_its_zygote_ends_itself_and_the_next_one_gets_another_with_the_preloads(
    runtime: RuntimeDir,
) -> None:
    report = _report("""
from host_client.errors import SessionLost
from host_client.providers.isolation import Isolation
# Landlock, where it is new enough, would already refuse the signal.
provider = BubblewrapProvider(isolation_of=lambda _: Isolation(landlock=False, enforced=False))
lenient = dataclasses.replace(lenient, preload=('colorsys',))
handle = provider.start(lenient, name='one')
with SandboxInterpreter(settings=lenient, provider=provider, sandbox='one') as first:
    report['zygotes'] = [first.execute("import os\\nos.getppid()")]
    report['memory'] = first.execute(
        "try: open(f'/proc/{os.getppid()}/mem', 'rb')\\nexcept OSError as error: print(type(error).__name__)"
    )
    try:
        first.execute("os.kill(os.getppid(), 19)\\nos._exit(3)")
    except SessionLost as error:
        report['lost'] = error.reason
with SandboxInterpreter(settings=lenient, provider=provider, sandbox='one') as second:
    report['zygotes'].append(second.execute("import os\\nos.getppid()"))
    report['preloaded'] = second.execute("import sys\\n'colorsys' in sys.modules")
provider.stop(handle)
""")
    assert "PermissionError" in str(report["memory"])
    assert report["lost"]
    assert report["preloaded"] is True
    assert len(set(report["zygotes"])) == 2  # type: ignore[call-overload]
    assert leaks(runtime) == []


def test_a_session_forks_and_is_rolled_back(runtime: RuntimeDir) -> None:
    report = _report("""
parent = SandboxInterpreter({"double": lambda n: n * 2}, settings=lenient, provider=provider)
parent.execute("x = [1]")
snapshot = parent.snapshot()
[branch] = parent.fork()
parent.execute("x.append(2)")
parent.rollback(snapshot)
report['rolled back'] = parent.execute("x")
report['called'] = branch.execute("double(21)")
try:
    branch.execute("import os; os.kill(os.getpid(), 11)")
except Exception as error:
    report['reason'] = error.reason
report['went on'] = parent.execute("double(len(x))")
branch.shutdown(wait=True)
parent.shutdown(wait=True)
""")
    assert report == {"rolled back": [1], "called": 42, "reason": "crashed(SIGSEGV)", "went on": 2}
    assert leaks(runtime) == []
