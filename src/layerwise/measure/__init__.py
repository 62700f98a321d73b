"""Measurements of rules and runs."""
