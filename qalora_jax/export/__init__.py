"""Merge, prove the merge, then one writer per format."""
