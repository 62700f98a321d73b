"""Campaigns: many seeded attempts to break a promise, with figures for `docs/reliability.md`."""
