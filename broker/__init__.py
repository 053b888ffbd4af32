"""What runs in the sandbox: the broker daemon, the supervisor (PID 1) and the worker.

Only ``broker.protocol`` is imported by the host; everything else here is carried into the image.
"""

#: Tells this package apart from a foreign one of the same name (see ``host_client``).
RLM_SANDBOX_BROKER = True

__version__ = "0.1.0"
