"""Telling a living owner from a dead one, and from a later process with its pid."""

from __future__ import annotations

import dataclasses
import os

import pytest

from host_client.owner import Owner
from tests.host_client.provider_fixtures import dead_owner


def test_this_process_is_alive() -> None:
    assert not Owner.current().is_dead()


def test_a_process_that_ended_is_dead() -> None:
    assert dead_owner().is_dead()


def test_a_zombie_is_dead() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert dataclasses.replace(Owner.current(), pid=pid).is_dead()
    os.waitpid(pid, 0)


def test_a_later_process_with_the_same_pid_is_another() -> None:
    assert dataclasses.replace(Owner.current(), start_ticks=1).is_dead()


def test_after_a_reboot_every_owner_is_dead() -> None:
    assert dataclasses.replace(Owner.current(), boot_id="00000000-0000-0000-0000-000000000000").is_dead()


def test_a_pid_of_another_namespace_cannot_be_judged() -> None:
    assert not dataclasses.replace(Owner.current(), pid_namespace=1, start_ticks=1).is_dead()


def test_label_and_file_name_are_read_back() -> None:
    owner = Owner.current()
    assert Owner.parse(owner.label()) == owner
    from_name = Owner.from_file_name(owner.file_name() + "-abcdef")
    assert from_name == dataclasses.replace(owner, boot_id=owner.boot_id[:8])
    assert not from_name.is_dead()


@pytest.mark.parametrize("label", ["", "x", "a:b:c:d", "boot:1:2", "boot:1:2:3:4"])
def test_foreign_labels_are_no_owner(label: str) -> None:
    assert Owner.parse(label) is None


@pytest.mark.parametrize("name", ["uids", "lock", "rlm-sandbox", "0123-1-2-3-x"])
def test_foreign_file_names_are_no_owner(name: str) -> None:
    assert Owner.from_file_name(name) is None
