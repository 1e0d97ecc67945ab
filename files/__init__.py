"""Files in devboxes: read, written, uploaded, downloaded."""
