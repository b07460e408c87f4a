"""Integrations know engines; the only place with version gates."""
