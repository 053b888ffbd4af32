#!/bin/sh
# Make .venv with the pinned dependencies. Called by the Makefile, which keeps the stamp.
set -eu

VENV=${1:-.venv}
PYTHON=${PYTHON:-python3}

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$1" >&2; [ $# -lt 2 ] || printf '  %s\n' "$2" >&2; exit 1; }

apt_python() {
    # Only root on Debian or Ubuntu: elsewhere we name the command and change nothing.
    { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; } || return 1
    say "[set-up] python: installing python3-venv with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    # A fresh machine has no package lists, an old one has stale ones: the first attempt may fail, the second tells why.
    apt-get install -y -qq --no-install-recommends python3 python3-venv >/dev/null 2>&1 </dev/null && return
    apt-get update -qq >/dev/null 2>&1 </dev/null || true
    apt-get install -y -qq --no-install-recommends python3 python3-venv </dev/null
}

can_make_venv() { command -v "$PYTHON" >/dev/null 2>&1 && "$PYTHON" -c 'import venv, ensurepip' >/dev/null 2>&1; }

can_make_venv || apt_python || true
can_make_venv || fail "$PYTHON cannot make virtual environments." \
    "On Debian and Ubuntu: sudo apt-get install -y python3-venv"
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$("$PYTHON" --version) is not supported; Python 3.10 to 3.13 is." "Name another one: make PYTHON=python3.12 ..."

say "[set-up] python: $("$PYTHON" --version) -> $VENV, pinned dependencies (a minute or two the first time)"
# One that was interrupted half-way, or whose Python is gone, is made again.
"$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear "$VENV" ||
    fail "$PYTHON could not make $VENV; its message is above." "On Debian and Ubuntu: sudo apt-get install -y python3-venv"
# -qq: pip's warnings about the machine's own configuration would drown the one line that matters.
"$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
    -c constraints.txt -e '.[dev]' </dev/null ||
    fail "pip could not install the dependencies; its message is above." "Without a network: set PIP_INDEX_URL to your mirror."
