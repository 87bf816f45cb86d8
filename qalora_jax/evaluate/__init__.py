"""What a model is worth: perplexity and multiple choice."""
