"""What an operator sets up before a real federation: the server's directory and each site's."""
