"""What is found out on images or by the clock: counts, methods, thresholds, policies.

May import: every floor below; nothing of formats or cli.
Start reading: ``searching.py`` (`tomepass.calibrate`), ``fastest.py`` (`tomepass.plan`),
``training.py`` (`tomepass.train_policy`).
"""
