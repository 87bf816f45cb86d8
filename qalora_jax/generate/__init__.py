"""Text from a model: sampling, decoding with a cache, the words as they come, chat templates."""
