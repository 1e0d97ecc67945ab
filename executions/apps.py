"""Django's entry for the executions app."""

from django.apps import AppConfig


class ExecutionsConfig(AppConfig):
    """Commands in devboxes."""

    name = "executions"
    verbose_name = "Executions"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Tell the hosts app who answers for `exe_` ids, logs what they are, and the sweep which rows are ours."""
        from devboxes import log_sources
        from executions import services, tasks  # noqa: F401
        from executions.log_source import ExecutionLogs
        from hosts import registry

        registry.register(
            "exe",
            registry.HostedKind(
                on_exits=services.finish_executions,
                expected_on_host=services.expected_on_host,
                over=services.over,
                on_heard=services.on_heard,
                before_destroy=services.before_destroy,
                after_destroy=services.after_destroy,
                doing=services.doing,
                before_suspend=services.before_suspend,
                after_suspend=services.after_suspend,
            ),
        )
        log_sources.register("exe", ExecutionLogs())
