"""What a graph holds: attention, blocks, the token axis, masks, protected tokens.

May import: capture and every floor below.
Start reading: ``structure.py`` finds the blocks, ``tokens.py`` follows the tokens through them.
"""
