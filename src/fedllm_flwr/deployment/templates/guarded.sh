#!/bin/sh
# Replaces Flower's program of this name, which the SuperNode starts: it runs only the installed
# package and no code from a server, and shows no run token on a command line.
exec @{python} -P -m fedllm_flwr.deployment.programs @{program} "$@@"
