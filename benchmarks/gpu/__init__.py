"""Measured on a GPU, in the order in which a borrowed quarter of an hour is best spent."""
