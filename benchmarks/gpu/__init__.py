"""What is measured on an NVIDIA GPU.

Start at ``quarter.py``, which says what a GPU borrowed for a quarter of an hour is spent on, or at
``command.py``, the command line. ``whole.py`` and ``profile.py`` measure whole models,
``kernels.py`` the kernels alone; ``correctness.py`` runs the cases of ``on_device.py``, which call
the checks of ``checks.py``. May import all of tomepass; nothing in tomepass imports it.
"""
