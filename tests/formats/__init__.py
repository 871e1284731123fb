"""Tests of the loaders of foreign files."""
