"""What the model learns from and is measured on: real digits, synthesised speech, docstrings, composed sentences.

Nothing is downloaded; everything follows from installed packages and a seed.
"""
