"""Tenants, members, API keys, caps and the sealing of secrets: who is calling and what they may do."""
