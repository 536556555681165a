"""How many tokens each block has and loses, in numbers alone.

May import: errors.
Start reading: ``schedule.py`` for what a user asks for, ``blocks.py`` for what becomes of it.
"""
