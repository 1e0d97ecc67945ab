"""Snapshots as a Django app."""

from django.apps import AppConfig


class SnapshotsConfig(AppConfig):
    name = "snapshots"
    verbose_name = "Snapshots"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Answer for `snp_` ids, and say what devboxes may be made of."""
        from devboxes import origins, saves
        from hosts import registry
        from snapshots import holders, services, tasks  # noqa: F401
        from snapshots.origins import SnapshotOrigins
        from snapshots.saves import SnapshotSaves

        registry.register(
            "snp",
            registry.HostedKind(
                on_heard=services.on_heard,
                before_destroy=services.disk_is_taken,
                before_suspend=services.disk_is_taken,
                why_not_shut_down=services.why_not_shut_down,
                superfluous=holders.on_report,
            ),
        )
        origins.register(SnapshotOrigins())
        saves.register(SnapshotSaves())
