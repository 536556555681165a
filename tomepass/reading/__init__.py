"""Finds out what a captured graph computes: attentions, blocks, token dimensions, masks.

Nothing is changed here: the results are frozen values that planning and rewriting use.

May import: capture and every floor below.
Start reading: ``structure.py`` finds the transformer blocks, ``tokens.py`` follows the dimension
that carries tokens through them, ``origins.py`` tells which tokens are protected.
"""
