"""Text on disk -> documents -> examples (tokens and loss mask) -> batches."""
