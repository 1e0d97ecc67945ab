"""The frame as a Django app, for its one model."""

from django.apps import AppConfig


class ApiConfig(AppConfig):
    name = "api"
    verbose_name = "Requests"
