"""The URLs of the operations on tunnels. What goes through one comes to other host names (`tunnels.hosted`)."""

from django.urls import path

from tunnels import api

urlpatterns = [
    path("v1/devboxes/<str:id>/enable_tunnel", api.EnableTunnel.as_view()),
    path("v1/devboxes/<str:id>/remove_tunnel", api.RemoveTunnel.as_view()),
]
