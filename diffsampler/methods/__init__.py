"""One file per method from a paper."""
