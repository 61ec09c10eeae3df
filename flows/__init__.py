"""Prefect flows and the `repae` command line; no torch is imported here."""
