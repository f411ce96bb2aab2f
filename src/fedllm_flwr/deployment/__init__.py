"""Deployment: directories of the server and the sites, and what runs in them."""
