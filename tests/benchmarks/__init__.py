"""Measured comparisons. `make bench NAME=refusal`; the last line of each is one JSON object."""
