"""Wheels for every system, made and checked on one machine: `python -m scripts.wheels.make OUT`."""
