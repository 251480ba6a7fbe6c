"""A Hub on loopback, with the faults of a real one, and the maker of the checkpoints that it serves."""
