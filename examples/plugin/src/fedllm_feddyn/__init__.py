"""FedDyn for fedllm-flwr, as a package of its own."""
