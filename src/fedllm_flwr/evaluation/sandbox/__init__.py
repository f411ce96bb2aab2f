"""Programs that nobody has read, run apart from everything else.

``programs`` is what callers use. It starts a ``watcher`` process for each program; the watcher
builds a room for it (``namespaces``, through the system calls in ``linux``), starts a fresh
interpreter there (``inside``), looks at the clock and at the memory, and ends whatever was started.
"""
