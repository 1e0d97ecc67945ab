"""SSH into devboxes as a Django app."""

from django.apps import AppConfig


class SshAccessConfig(AppConfig):
    name = "ssh_access"
    verbose_name = "SSH access"
