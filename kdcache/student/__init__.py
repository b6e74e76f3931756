"""Stage 2: train a student from a cache; the loss, the order of samples, and what a run is."""
