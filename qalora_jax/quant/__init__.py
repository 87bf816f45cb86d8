"""Quantizers: from a dense matrix to a `QTensor` and back.  Knows no model and no adapter."""
