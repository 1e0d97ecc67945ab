"""The Django app, and what it brings to the rooms below it."""

from django.apps import AppConfig


class DevboxesConfig(AppConfig):
    name = "devboxes"
    verbose_name = "Devboxes"

    def ready(self) -> None:
        """Register the flow, and whom hosts tell of boxes' ends and launch work's exits."""
        from devboxes import hosted
        from devboxes.devbox_flow import devbox_flow
        from flows.engine import register

        register(devbox_flow)
        hosted.register()
