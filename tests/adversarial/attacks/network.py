"""Reaching anything outside."""

from __future__ import annotations

from tests.adversarial.attack import Attack, denied

_FAMILY = "network"

#: Family, kind, and whether an ordinary kernel would give it to anybody.
_SOCKETS = {
    "IPv4": (2, 1, True),
    "IPv4 datagrams": (2, 2, True),
    "IPv4 raw": (2, 3, False),
    "IPv6": (10, 1, True),
    "netlink": (16, 3, True),
    "packets": (17, 3, False),
    "AF_ALG": (38, 5, False),
    "virtual machines' sockets": (40, 1, False),
    "Bluetooth": (31, 3, False),
    "CAN bus": (29, 3, False),
    "TIPC": (30, 1, False),
    "RDS": (21, 5, False),
    "XDP": (44, 3, False),
    "SMC": (43, 1, False),
}

_IA32 = """
import mmap
def by_interrupt():
    'socket(AF_INET, SOCK_STREAM, 0) as a 32-bit program would ask for it.'
    code = b'\\x53\\xb8' + struct.pack('<I', 359) + b'\\xbb\\x02\\0\\0\\0\\xb9\\x01\\0\\0\\0\\x31\\xd2\\xcd\\x80\\x5b\\xc3'
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    os._exit(7 if result >= 0 else -result)
"""

ATTACKS = [
    *(
        denied(f"a socket: {name}", _FAMILY, f"socket.socket({family}, {kind})", falls=falls)
        for name, (family, kind, falls) in _SOCKETS.items()
    ),
    denied("a pair of IPv4 sockets", _FAMILY, "socket.socketpair(socket.AF_INET)"),
    Attack(
        name="a socket of the x32 interface",
        family=_FAMILY,
        code="in_child(lambda: call(0x40000029, 198, 2, 1, 0)) in (-31, 1)",  # SIGSYS, or an errno
        expects="VALUE ALIVE",
        value=True,
    ),
    denied("a socket by io_uring", _FAMILY, "call(425, 425, 4, ctypes.create_string_buffer(256))", falls=True),
    Attack(
        name="a socket of the 32-bit interface",
        family=_FAMILY,
        # SIGSYS is 31, EPERM 1, ENOSYS 38; elsewhere than on x86-64 there is no such interface.
        code=f"{_IA32}\nin_child(by_interrupt) in (-31, -11, 1, 38) if _X86 else True",
        expects="VALUE ALIVE",
        value=True,
    ),
    Attack(
        name="names of hosts",
        family=_FAMILY,
        code="try: answer = socket.getaddrinfo('localhost.example', 80)\nexcept OSError: answer = 'nothing'\nanswer",
        expects="VALUE ALIVE",
        value="nothing",
    ),
    Attack(
        name="sockets of the engine and of services",
        family=_FAMILY,
        code="""
[path for path in ('/var/run/docker.sock', '/run/docker.sock', '/run/systemd/private', '/run/dbus/system_bus_socket',
                   '/run/containerd/containerd.sock', '/var/run/nscd/socket') if os.path.lexists(path)]""",
        expects="VALUE ALIVE",
        value=[],
    ),
    Attack(
        name="interfaces",
        family=_FAMILY,
        code="sorted(set(os.listdir('/sys/class/net')) - {'lo', 'tunl0', 'sit0', 'ip6tnl0', 'gre0', 'gretap0', 'erspan0', 'ip_vti0', 'ip6_vti0', 'ip6gre0'})",
        expects="VALUE ALIVE",
        value=[],
        falls="VALUE",
    ),
]
