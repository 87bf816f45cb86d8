"""The one reader of frozen weights, `qmatmul`, and what stands behind it."""
