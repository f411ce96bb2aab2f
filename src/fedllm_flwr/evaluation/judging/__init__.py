"""Open-ended answers and the judges that grade them. Importing it does not import torch."""
