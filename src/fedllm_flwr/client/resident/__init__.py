"""A site's resident trainer: one process that keeps model and data between rounds."""
