"""Django's entry for the files app."""

from django.apps import AppConfig


class FilesConfig(AppConfig):
    """Files in devboxes. It has no tables: files are where they are."""

    name = "files"
    verbose_name = "Files"
