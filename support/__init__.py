"""Plumbing: what a command line tool needs and a paper does not mention.

Nothing in this folder knows models, settings or runs. Plain values go in, and no module of the top
level is imported from here. console.py, files.py, layouts.py and images.py import no torch.
"""
