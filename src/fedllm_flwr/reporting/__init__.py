"""Reports of a run: console, metrics, figures, trackers, model card."""
