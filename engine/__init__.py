"""From a raw plane to a refocused plane: scale, generate, check.

Knows no microscope and no layout of a run on disk.
"""
