"""How strongly a container is isolated, apart from how large it may grow: one object, which tests can weaken."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from host_client.seccomp import Profile, own_profile, read_profile
from host_client.settings import SandboxSettings

#: Only PID 1 has them: to run the broker and the sessions under their uids, to kill the latter, and to take its
#: children the right to ever have one.
CAPABILITIES = ("SETUID", "SETGID", "KILL", "SETPCAP")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """What stands between generated code and the machine.

    Attributes:
        network: The engine's network mode.
        seccomp: The profile, or None for the engine's default one.
        capabilities: What PID 1 holds.
        separate_users: Whether broker and sessions have uids of their own. Without, there is no boundary at all
            between them; only a test that shows its attack to be real wants that.
        landlock: Whether workers restrict themselves where the kernel has Landlock.
        runtime: OCI runtime, or None for the engine's default.
        enforced: Whether a sandbox that turns out weaker than this is refused.
    """

    network: str = "none"
    seccomp: Profile | None = dataclasses.field(default_factory=own_profile)
    capabilities: tuple[str, ...] = CAPABILITIES
    separate_users: bool = True
    landlock: bool = True
    runtime: str | None = None
    enforced: bool = True

    @classmethod
    def of(cls, settings: SandboxSettings) -> Isolation:
        """Return what the settings ask for.

        Raises:
            BadSetting: The user's own seccomp profile cannot be used.
        """
        return cls(
            network="bridge" if settings.network else "none",
            seccomp=read_profile(settings.seccomp) if settings.seccomp else own_profile(network=settings.network),
            runtime=settings.runtime,
            enforced=not settings.insecure,
        )

    def keywords(self, broker_uid: int) -> dict[str, Any]:
        """Return the keywords for ``DockerEngine.create_container``."""
        # The engine hides parts of /proc and /sys by itself; no keyword here takes that away.
        return {
            # PID 1 needs its capabilities; what it starts runs under other uids.
            "user": "0:0" if self.separate_users else f"{broker_uid}:{broker_uid}",
            "network_mode": self.network,
            "read_only": True,
            "cap_drop": ["ALL"],
            "cap_add": list(self.capabilities) if self.separate_users else [],
            "security_opt": ["no-new-privileges:true", *self._seccomp_option()],
            "ipc_mode": "private",
            "init": False,
            "runtime": self.runtime,
            "host_config": {"CgroupnsMode": "private"},
        }

    def _seccomp_option(self) -> list[str]:
        return [] if self.seccomp is None else [f"seccomp={json.dumps(self.seccomp, separators=(',', ':'))}"]
