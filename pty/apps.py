"""Terminals as a Django app."""

from django.apps import AppConfig


class PtyConfig(AppConfig):
    name = "pty"
    verbose_name = "Terminals"
