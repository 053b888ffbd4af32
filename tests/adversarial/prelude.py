"""What an attacker brings along. Its text is run inside the sandbox, before each attack of a session."""

import contextlib
import ctypes
import errno
import gc
import json
import os
import platform
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

HOST_SOCKET = "/run/rlm-sandbox/host/host.sock"
GUEST_SOCKET = "/run/rlm-sandbox/guest/guest.sock"
_libc = ctypes.CDLL(None, use_errno=True)
_X86 = platform.machine() == "x86_64"


def attempt(action):
    """Name of the errno with which an action fails, or "worked"."""
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return "worked"


def call(x86_64, aarch64, *arguments):
    """A system call by its numbers."""
    passed = [a if isinstance(a, (bytes, ctypes.Array)) else ctypes.c_long(a) for a in arguments]
    result = _libc.syscall(ctypes.c_long(x86_64 if _X86 else aarch64), *passed)
    if result == -1:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def others():
    """Processes that are not this one's family: the supervisor, the broker, neighbours."""
    own, mine = {os.getpid()}, os.getsid(0)
    found = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            if pid not in own and os.getsid(pid) != mine:
                found.append(pid)
    return found


def broker():
    """The broker's pid."""
    for pid in others():
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
            if b"broker" in words:
                return pid
    raise LookupError("no broker")


def connect(path):
    """A connection to a socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(path)
    return sock


def http(path, method, target, body=None, headers=""):
    """One request; the status and the JSON of its answer."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
    with connect(path) as sock:
        sock.settimeout(30)
        sock.sendall(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        answer = read_answer(sock)
    head, _, payload = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(payload)


def read_answer(sock):
    """One whole answer off a connection."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += sock.recv(65536) or b"\r\n\r\n"
    head, _, payload = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(payload) < length:
        payload += sock.recv(65536) or b" " * length
    return head + b"\r\n\r\n" + payload


def guest(method, target, body=None, headers=""):
    """A request to the guest plane."""
    return http(GUEST_SOCKET, method, target, body, headers)


def execution_id():
    """The id of the running execution, out of the worker's memory."""
    [current] = [thing for thing in gc.get_objects() if type(thing).__name__ == "Current"]
    return current.execution.execution_id


def forged_call(tool, *args, key=None, execution=None, wait_s=10, **kwargs):
    """A tool call made by hand; the status and the answer."""
    body = {
        "key": key or os.urandom(8).hex(),
        "execution_id": execution or execution_id(),
        "tool": tool,
        "args": list(args),
        "kwargs": kwargs,
        "wait_s": wait_s,
    }
    return guest("POST", "/v1/tool-calls", body)


def channel_fd():
    """The worker's own channel, out of its memory."""
    return inbox()._channel.fileno()


def lane_fd():
    """The worker's end of the lane, or None where there is none."""
    lane = inbox()._lane
    return None if lane is None else lane.fileno()


def inbox():
    """What the worker reads its channel and its lane with."""
    [found] = [thing for thing in gc.get_objects() if type(thing).__name__ == "Inbox"]
    return found


def send_raw(data):
    """Bytes on the worker's channel."""
    view = memoryview(data)
    while view:
        view = view[os.write(channel_fd(), view) :]


def lane_raw(data):
    """Bytes on the lane, as far as they are taken; tells whether there was one."""
    fd = lane_fd()
    if fd is None:
        return False
    view = memoryview(data)
    with contextlib.suppress(OSError):  # the host closes it
        while view:
            view = view[os.write(fd, view) :]
    return True


def lane_call(key, tool="tally", *args, **more):
    """The frame of a tool call, as the worker tells it to the broker and then to the host."""
    header = {"type": "call", "key": key, "execution_id": execution_id(), "tool": tool, "args": args, "kwargs": {}}
    return frame({**header, **more})


def frame(header, *blobs):
    """A frame."""
    head = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    return struct.pack(">I", len(head)) + head + b"".join(blobs)


def result(value=None, *, outcome="ok", execution=None, **more):
    """The header of a result frame, by default for the running execution."""
    return {"type": "result", "execution_id": execution or execution_id(), "outcome": outcome, "value": value, **more}


def send_result(value=None, *blobs, **more):
    """A forged result of this execution."""
    send_raw(frame(result(value, **more), *blobs))


def in_child(action):
    """Run something in a forked child; its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
