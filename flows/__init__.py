"""The engine that runs every durable row: claim, step, settle, wake. It knows no domain and imports none."""
