"""Tunnels as a Django app."""

from django.apps import AppConfig


class TunnelsConfig(AppConfig):
    name = "tunnels"
    verbose_name = "Tunnels"

    def ready(self) -> None:
        """A devbox may be made with a tunnel, and shows it."""
        from devboxes import extensions
        from tunnels import services

        extensions.register(services.FIELD)
