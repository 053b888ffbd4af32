"""What a pool looks like: one value object."""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Any

from host_client.errors import BadSetting

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
#: As many as this user's runtime directory has ranges of uids for, roughly.
MAX_PLACES = 256


class Exhaustion(str, enum.Enum):
    """What happens to who asks while every place is taken."""

    FAIL_FAST = "fail_fast"
    WAIT = "wait"
    OVERFLOW = "overflow"


class Affinity(str, enum.Enum):
    """What happens to a named session whose sandbox is in use, or gone."""

    HINT = "hint"
    STRICT_QUEUE = "strict_queue"
    STRICT_FAIL_FAST = "strict_fail_fast"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """How a pool behaves. See ``SandboxPool`` for the words.

    Attributes:
        name: Its name in this process.
        min_size: Sandboxes kept warm, as far as ``max_size`` leaves places.
        max_size: Most sandboxes at once, warm, in use, kept for a session or ending.
        exhaustion: ``fail_fast``, ``wait`` or ``overflow``.
        affinity: ``hint``, ``strict_queue`` or ``strict_fail_fast``.
        wait_timeout_s: Longest wait for a place, in seconds.
        max_waiting: Most who may wait at once.
        max_uses: How often the sandbox of a named session is handed out before it is ended; None for no limit.
        max_age_s: Age at which a sandbox that is not in use is ended, in seconds; None for no limit.
        idle_timeout_s: After how long a session's sandbox that nobody uses, or a warm one beyond ``min_size``, is
            ended, in seconds; None for never.
        health_interval_s: How often sandboxes that are not in use are asked whether they are well, in seconds.
        rest_after_s: After this long without use, not even ``min_size`` are kept until the next use; None for never.
    """

    name: str
    min_size: int = 1
    max_size: int = 4
    exhaustion: Exhaustion | str = Exhaustion.WAIT
    affinity: Affinity | str = Affinity.HINT
    wait_timeout_s: float = 3600.0
    max_waiting: int = 1000
    max_uses: int | None = None
    max_age_s: float | None = 3600.0
    idle_timeout_s: float | None = 300.0
    health_interval_s: float = 30.0
    rest_after_s: float | None = None

    def __post_init__(self) -> None:
        self._require("name", _NAME.fullmatch(str(self.name)) is not None, "up to 63 letters, digits, '_', '.', '-'")
        object.__setattr__(self, "exhaustion", self._member("exhaustion", Exhaustion))
        object.__setattr__(self, "affinity", self._member("affinity", Affinity))
        for field, low in (("min_size", 0), ("max_size", 1), ("max_waiting", 0), ("max_uses", 1)):
            self._whole(field, low)
        self._require("max_size", self.max_size <= MAX_PLACES, f"at most {MAX_PLACES}")
        self._require("min_size", self.min_size <= self.max_size, f"at most max_size={self.max_size}")
        for field in ("wait_timeout_s", "max_age_s", "idle_timeout_s", "health_interval_s", "rest_after_s"):
            self._seconds(field)

    def _whole(self, field: str, low: int) -> None:
        value = getattr(self, field)
        optional = field == "max_uses" and value is None
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= low
        self._require(field, optional or whole, f"a whole number, at least {low}")

    def _seconds(self, field: str) -> None:
        value = getattr(self, field)
        optional = value is None and field not in ("wait_timeout_s", "health_interval_s")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e9
        self._require(field, optional or number, "seconds, more than 0" + ", or None" * (value is None))

    def _member(self, field: str, kind: type[enum.Enum]) -> Any:
        value = getattr(self, field)
        known = [each.value for each in kind]
        self._require(field, value in known, f"one of {', '.join(known)}")
        return kind(value)

    def _require(self, field: str, holds: bool, wanted: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise BadSetting(f"pool {self.name!r:.80}: {field}={value!r:.80}: must be {wanted}")
