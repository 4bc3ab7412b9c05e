"""Plumbing of the commands that has nothing to do with the paper.

These modules know nothing of models, settings or runs. They take plain values and import no
top-level module. console.py, files.py, layouts.py and images.py do not import torch.
"""
