"""Sizes and times that host, broker and worker agree on, each with its reason."""

from __future__ import annotations

#: A header holds code and the skeleton of the values, never the large values themselves.
MAX_HEADER_BYTES = 64 << 20

#: One frame with its blobs; a 1 GiB context still fits.
MAX_FRAME_BYTES = 2 << 30

#: What generated code may send in one tool call, and a tool may answer.
MAX_TOOL_CALL_BYTES = 256 << 20

#: What generated code sends in one framed request; thousands of its connections may hold that much at once. More goes
#: by HTTP, where room for each body is reserved before it is read.
MAX_GUEST_FRAME_BYTES = 32 << 10

#: Memory files whose descriptors the broker holds for one session, in calls and in stored replies; of the older ones it
#: holds the bytes. So generated code cannot use up the broker's descriptors, of which other sessions live too.
MAX_SESSION_FILES = 64

#: Strings and bytes from here on travel as raw blobs: JSON would escape and copy them.
BLOB_THRESHOLD_BYTES = 4 << 10

#: Values from here on are kept by the worker, so that the host need not send them again.
KEEP_THRESHOLD_BYTES = 64 << 10

#: One model reply fits; a runaway ``print`` does not.
MAX_OUTPUT_BYTES = 1 << 20

#: The most that a host may ask for: output travels in the header, where a character may take six bytes.
MOST_OUTPUT_BYTES = 8 << 20

#: Output thrown away past this ends the execution: nobody prints so much on purpose.
MAX_DISCARDED_OUTPUT_BYTES = 256 << 20

#: The text of one value shown like a REPL would.
MAX_DISPLAY_CHARS = 100_000

#: Nested deeper than this, a value is refused with its path; Python's own parser gives up near 1,000.
MAX_DEPTH = 100

#: Nesting of the JSON itself: a tagged value takes up to three levels for one of its own.
MAX_JSON_DEPTH = 3 * MAX_DEPTH + 50

#: Lists and objects of one JSON text. Each takes up to 200 bytes of memory for the two that it was written in, so a
#: text within its limit could take a hundred times its size. A table of 900,000 rows still fits.
MAX_JSON_CONTAINERS = 1_000_000

#: Keys (or members of a set) with one and the same hash. Python's numbers hash alike on every machine, so that somebody
#: can choose some that collide: a hundred thousand keep the host busy for a minute, a million for hours.
MAX_EQUAL_HASHES = 64

#: Longer integers than this cost quadratic time to parse.
MAX_INTEGER_DIGITS = 4_000

#: The longest that one long poll is held open, below the time-outs of common proxies.
MAX_WAIT_S = 25.0

#: A claim not renewed for this long is taken away. Long polls renew it every MAX_WAIT_S at the latest.
DEFAULT_LEASE_S = 60.0

#: An execution that is over so soon may tell the host itself (the lane); later the broker has taken it in hand.
LANE_REPLY_S = 0.01

#: A message with more than this goes the ordinary way: what is on the lane leaves at once (the kernel takes up to so
#: much of a stream as one piece), and is read at once.
MAX_LANE_BYTES = 32 << 10

#: So much output the worker takes back out of the pipe and tells with an execution's end, on the lane.
MAX_LANE_OUTPUT_BYTES = 16 << 10

#: Of an execution that prints more than this the broker reads the output at once: it is less than any pipe holds.
LANE_PIPE_BYTES = 32 << 10

#: How long the broker leaves an execution to the lane before it brings it itself, and reads what it prints.
LANE_PATIENCE_S = 0.03

#: Between the interrupt at the deadline and the kill.
INTERRUPT_GRACE_S = 2.0

#: How many finished executions keep their reply, so that a lost reply can be fetched again.
STORED_EXECUTIONS = 64

#: A started call whose holder fell silent, or whose session was attached anew, is kept so long for an answer, or for
#: a word of the new holder; then nobody knows. Not shorter than a sandbox lingers without a host.
ATTACH_GRACE_S = 60.0

#: Claims handed out at once; also how many tools the host runs at the same time by default.
DEFAULT_CONCURRENT_TOOL_CALLS = 32

#: Tool calls waiting in one session; a runaway loop of threads meets an error instead of the memory limit.
MAX_PENDING_TOOL_CALLS = 10_000

#: Snapshots of one session. Each is a process that waits: its own page tables, and what has changed since.
MAX_SNAPSHOTS = 32

#: Sessions and snapshots that come from one session by forking: processes under one user, in one memory limit.
MAX_FAMILY = 128
