"""Django's entry for the hosts app."""

from django.apps import AppConfig


class HostsConfig(AppConfig):
    """VM hosts."""

    name = "hosts"
    verbose_name = "VM hosts"
    default_auto_field = "django.db.models.BigAutoField"
