"""The ZeroMQ service that answers raw scans with segmentations (see README.md)."""
