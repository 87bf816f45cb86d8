"""Model families, and `linear`, where a frozen matrix meets its adapter."""
