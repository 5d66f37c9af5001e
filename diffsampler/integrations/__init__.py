"""Bridges to other libraries: the only home of Pyro models and ArviZ. Nothing here is imported eagerly."""
