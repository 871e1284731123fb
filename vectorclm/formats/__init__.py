"""Loaders of foreign files, one module a format: a path or bytes go in; checked values or one typed error come out."""
