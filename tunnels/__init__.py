"""HTTP and WebSockets into a devbox."""
