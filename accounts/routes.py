"""The URLs of accounts."""

from django.urls import path

from accounts.api import ApiKeys, Me

urlpatterns = [
    path("v1/accounts/me", Me.as_view()),
    path("v1/apikeys", ApiKeys.as_view()),
]
