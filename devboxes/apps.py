"""The Django app, and what it brings to the rooms below it."""

from django.apps import AppConfig


class DevboxesConfig(AppConfig):
    name = "devboxes"
    verbose_name = "Devboxes"

    def ready(self) -> None:
        """Register the flow, whom hosts tell of boxes' ends and launch work's exits, and launch work with logs."""
        from devboxes import hosted, log_sources
        from devboxes.devbox_flow import devbox_flow
        from flows.engine import register

        register(devbox_flow)
        hosted.register()
        log_sources.register("set", log_sources.LaunchWork())
