"""Liver segmentation in MRI stacks: train, evaluate, predict (see README.md)."""
