"""Commands run in devboxes: their rows, their flow, their output and the API over them."""
