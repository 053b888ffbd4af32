"""The worker: one process that holds one session's REPL. Standard library and ``broker.protocol`` only.

``main``        the loop: a frame in, an execution, a frame out
``channel``     frames over the socket pair to the broker, with the output pipe's descriptor
``current``     which execution runs, and which threads belong to it
``cells``       source text to code objects
``repl``        the namespace and one run through it
``event_loop``  top-level ``await``
``interrupts``  SIGINT, and the one frame below which it may strike
``unwinding``   leaving generated code that catches everything
``capture``     descriptors 1 and 2, ``sys.stdout`` and ``sys.stderr``
``display``     values as a REPL shows them
``tracebacks``  exceptions as text, without frames of the worker
``submit``      SUBMIT and its ``field_types``
``proxies``     the tools as functions, over ``tool_calls`` and ``guest_http``
``threads``     tagging threads with the execution that started them
"""
