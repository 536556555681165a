"""Measured on a processor: time, memory, and what capturing and compiling take."""
