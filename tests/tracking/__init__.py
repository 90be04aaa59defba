"""Tests of the wing `tracking`."""
