"""What a run shows and leaves: console, metrics, figures, trackers, model card."""
