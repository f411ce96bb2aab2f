#!/bin/sh
# Flower's SuperNode starts this for each message. In the place of Flower's own program of this
# name it answers with the installed package and never loads code that a server has sent.
exec @{python} -P -m fedllm_flwr.guard "$@@"
