#!/bin/sh
# In the place of Flower's program of this name, which the SuperNode starts: it runs the installed
# package and never code that a server has sent, and shows no run's token on a command line.
exec @{python} -P -m fedllm_flwr.deployment.programs @{program} "$@@"
