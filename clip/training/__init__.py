"""Learning: pairs in batches, a loss, an optimiser, and the loop that puts them together."""
