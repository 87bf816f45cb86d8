"""`python -m qalora_jax VERB` is `qalora VERB`."""

from qalora_jax import cli

cli.main()
