"""Accounts, members, keys and operators in the admin. A key's secret is shown once, when it is made here."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.contrib.auth.admin import GroupAdmin, UserAdmin
from django.contrib.auth.models import Group, User
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from unfold.admin import ModelAdmin
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from accounts.models import Account, ApiKey, Member
from accounts.services import create_key, revoke_key


def link_to_account(account: Account) -> str:
    """The account's name as a link to its page."""
    return format_html('<a href="{}">{}</a>', reverse("admin:accounts_account_change", args=[account.pk]), account.name)


@admin.register(Account)
class AccountAdmin(ModelAdmin):  # type: ignore[misc]  # unfold brings no types
    list_display = ("name", "id", "status", "max_running_devboxes", "created_at")
    list_filter = ("status",)
    search_fields = ("id", "name")
    readonly_fields = ("id", "created_at")
    ordering = ("-created_at",)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Accounts are disabled, not deleted: what they own would go with them unseen."""
        return False


@admin.register(Member)
class MemberAdmin(ModelAdmin):  # type: ignore[misc]
    list_display = ("name", "id", "email", "of_account", "created_at")
    list_select_related = ("account",)
    search_fields = ("id", "name", "email", "account__name", "account__id")
    autocomplete_fields = ("account",)
    readonly_fields = ("id", "created_at")
    ordering = ("-created_at",)

    @admin.display(description="account", ordering="account__name")
    def of_account(self, member: Member) -> str:
        return link_to_account(member.account)


@admin.register(ApiKey)
class ApiKeyAdmin(ModelAdmin):  # type: ignore[misc]
    list_display = ("prefix", "name", "of_account", "member", "access", "last_used_at", "expires_at", "revoked_at")
    list_select_related = ("account", "member")
    list_filter = ("access",)
    search_fields = ("id", "prefix", "name", "account__name", "account__id", "member__name")
    autocomplete_fields = ("account", "member")
    fields = (
        "id",
        "prefix",
        "account",
        "member",
        "name",
        "access",
        "expires_at",
        "created_at",
        "last_used_at",
        "revoked_at",
    )
    ordering = ("-created_at",)
    actions = ("revoke",)

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        """Whose key it is never changes once it is made."""
        own = ("id", "prefix", "created_at", "last_used_at", "revoked_at")
        return own if obj is None else (*own, "account", "member", "access")

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        if change:
            ApiKey.objects.filter(pk=obj.pk).update(name=obj.name, expires_at=obj.expires_at)
            return
        key, secret = create_key(
            obj.account_id,
            obj.name,
            member=obj.member_id,
            expires_at=obj.expires_at,
            read_only=obj.access == ApiKey.Access.READ_ONLY,
        )
        obj.pk = key.pk
        obj.refresh_from_db()
        messages.warning(request, f"The key's secret, shown this once: {secret}")

    @admin.action(description="Revoke at once")
    def revoke(self, request: HttpRequest, keys: QuerySet[ApiKey]) -> None:
        count = sum(revoke_key(key) for key in keys.values_list("pk", flat=True))
        messages.success(request, f"{count} keys revoked")

    @admin.display(description="account", ordering="account__name")
    def of_account(self, key: ApiKey) -> str:
        return link_to_account(key.account)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Keys are revoked: the row says who did what."""
        return False


admin.site.unregister(User)
admin.site.unregister(Group)


@admin.register(User)
class OperatorAdmin(UserAdmin, ModelAdmin):  # type: ignore[misc,type-arg]
    """The people who run this installation; a superuser is an operator."""

    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm


@admin.register(Group)
class OperatorGroupAdmin(GroupAdmin, ModelAdmin):  # type: ignore[misc]
    pass
