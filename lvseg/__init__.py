"""Liver segmentation in MRI stacks: train, evaluate, predict (see README.md)."""

import os

# Before TensorFlow is imported: its C++ code would greet every command with warnings of GPUs that are not there.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
