"""Records, templates, tokens and clients: everything between a data file and a training batch."""
