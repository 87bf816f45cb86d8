"""Documents of the Hugging Face hub, through the `datasets` package."""

# A part of a data set that is one file.
PARQUET = 'hf://datasets/{repository}/{folder}/{name}-00000-of-00001.parquet'


def load(path: str, name: str | None, split: str, *, way_out: str, **options) -> list[dict]:
  """The rows of one part of a data set; `way_out` says which files serve instead.

  Raises ValueError where `datasets` does not load, FileNotFoundError where the hub does not give the data set.
  """
  try:
    import datasets
  except ImportError as error:
    raise ValueError(
      f"{path} is on the hub, and the package datasets does not load ({error}): pip install 'qalora_jax[eval]', or "
      f'name local files in evaluate.data: {way_out}'
    ) from error
  try:
    return [dict(row) for row in datasets.load_dataset(path, name, split=split, **options)]
  except Exception as error:  # The package raises its own errors, the hub client's and those of two HTTP libraries.
    raise FileNotFoundError(
      f'the hub did not give {path}{f" ({name})" if name else ""}, part {split} ({type(error).__name__}: {error}). '
      f'Download https://huggingface.co/datasets/{path} elsewhere, and name the directory in evaluate.data: {way_out}'
    ) from error
