"""Deployment: the directories of server and sites, and the programs that use them."""
