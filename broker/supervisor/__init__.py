"""PID 1 of the sandbox: starts the broker, forks and ends workers. It knows no HTTP and parses nothing of a worker's.

Standard library only. See ``docs/decisions/001-processes-and-planes.md`` and ``supervisor/config.py``.
"""
