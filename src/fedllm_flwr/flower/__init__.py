"""Flower beyond its public packages: names, the server's calls, the sites' connection.

``flwr.app``, ``flwr.clientapp``, ``flwr.serverapp`` and ``flwr.simulation`` are used anywhere. All
else of Flower is found by `names.find`, where the installed version keeps it
(docs/flower-versions.md).
"""
