"""The name that formats had in version 0.1: see :mod:`tomepass.formats`."""
