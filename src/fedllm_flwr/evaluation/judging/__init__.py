"""Open-ended answers and the judges that grade them; nothing here imports torch when imported."""
