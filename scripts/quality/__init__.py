"""What forms of weights lose: a model trained to measure it on, and the measurement."""
