"""Experiments: small end-to-end studies, one folder each."""
