"""A session's namespace as bytes, and back: what ``interpreter.save`` and ``interpreter.restore`` ask of the worker.

All of it runs with the session's own rights. Reading the bytes runs what is in them, which is why only a sandbox does.
"""
