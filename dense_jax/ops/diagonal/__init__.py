"""Diagonal states with one decay for each of E x N numbers: the selective recurrence of Mamba.

`reference.py` is the specification. Layers make recurrences through `form.py`; `sequence.py` and
`token.py` hold their classes, and the other files the computations that they run. `tpu*.py` and
`cpu.py` are for those platforms only.
"""
