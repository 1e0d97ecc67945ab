"""Endpoints of accounts: who am I, and making a key."""

from __future__ import annotations

import datetime
from typing import Any

from django.db import transaction
from drf_spectacular.utils import OpenApiResponse, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from accounts.access import access_account, access_key
from accounts.authentication import digest as digest_of
from accounts.models import ApiKey
from accounts.services import NAME_MAX, create_key, new_secret, secret_of_request
from api.callers import Caller
from api.errors import BadRequest, Conflict, Forbidden
from api.idempotency import body_digest, idempotent
from api.ids import new_id
from api.permissions import caller_of, raw_body_of, request_id_of
from api.validation import INT64_MAX, StrictSerializer, TextField, WholeField


class BillingView(serializers.Serializer[Any]):
    account_billing_type = serializers.CharField()


class AccountView(serializers.Serializer[Any]):
    id = serializers.CharField()
    name = serializers.CharField()
    created_at = serializers.CharField(help_text="ISO 8601, UTC.")
    account_status = serializers.ChoiceField(choices=["ACCOUNT_STATUS_ENABLED", "ACCOUNT_STATUS_DISABLED"])
    tier = serializers.CharField()
    billing = BillingView()


class Me(APIView):
    @extend_schema(
        operation_id="getMyAccount",
        tags=["accounts"],
        summary="The account this key belongs to.",
        responses=AccountView,
    )
    def get(self, request: Request) -> Response:
        account = access_account(caller_of(request))
        return Response(
            {
                "id": account.pk,
                "name": account.name,
                "created_at": account.created_at.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z"),
                "account_status": f"ACCOUNT_STATUS_{account.status.upper()}",
                "tier": "ACCOUNT_TIER_PRO",
                "billing": {"account_billing_type": "ACCOUNT_BILLING_TYPE_UNSPECIFIED"},
            }
        )


class ApiKeyCreateParameters(StrictSerializer):
    name = TextField(required=False, allow_null=True, max_length=NAME_MAX)
    expires_at_ms = WholeField(required=False, allow_null=True, min_value=0, max_value=INT64_MAX)


class ApiKeyCreatedView(serializers.Serializer[Any]):
    id = serializers.CharField()
    name = serializers.CharField()
    key_secret = serializers.CharField(help_text="Shown in this answer only.")
    expires_at_ms = serializers.IntegerField(allow_null=True)


class ApiKeys(APIView):
    @extend_schema(
        operation_id="createAPIKey",
        tags=["apikeys"],
        summary="Make an API key for this account.",
        request=ApiKeyCreateParameters,
        responses={
            200: ApiKeyCreatedView,
            409: OpenApiResponse(description="The key that this request made is of no use any more."),
        },
    )
    def post(self, request: Request) -> Response:
        caller = caller_of(request)
        asked = ApiKeyCreateParameters(data=request.data)
        asked.is_valid(raise_exception=True)
        name = asked.validated_data.get("name") or ""
        expires_at_ms = _within_own_life(caller, asked.validated_data.get("expires_at_ms"))
        request_id = request_id_of(request)
        new, fresh = new_id("key"), new_secret()

        def secret_of(key_id: str) -> str:
            return secret_of_request(caller.key_id or "", key_id, request_id) if request_id else fresh

        def make() -> str:
            expires_at = _moment(expires_at_ms)
            create_key(caller.account_id, name, caller.member_id, expires_at, key_id=new, secret=secret_of(new))
            return new

        with transaction.atomic():
            digest = body_digest(raw_body_of(request))
            made, replayed = idempotent(caller, request_id, "apikeys.create", digest, make, new)
            key = access_key(caller, made)
            secret = secret_of(made)
            if replayed:
                _check_usable(key, secret)
        ends = None if key.expires_at is None else round(key.expires_at.timestamp() * 1000)
        return Response({"id": made, "name": key.name, "key_secret": secret, "expires_at_ms": ends})


def _check_usable(key: ApiKey, secret: str) -> None:
    """Raises Conflict unless the key that an earlier request made still lets its holder in by this secret."""
    if key.revoked_at is not None:
        raise Conflict(f"the key {key.pk} that this x-request-id made has been revoked; use a new id for a new key")
    if key.expires_at is not None and key.expires_at <= datetime.datetime.now(datetime.UTC):
        raise Conflict(f"the key {key.pk} that this x-request-id made has expired; use a new id for a new key")
    if digest_of(secret) != bytes(key.secret_sha256):
        raise Conflict(
            f"the secret of the key {key.pk} that this x-request-id made is told again to the key that asked for it "
            "only; use a new id for a new key"
        )


def _within_own_life(caller: Caller, expires_at_ms: int | None) -> int | None:
    """When the new key ends: as asked, but not after the key that asks, else whoever took a key that ends soon could
    make one that never does. Raises Forbidden when a later end was asked for."""
    own = ApiKey.objects.filter(pk=caller.key_id).values_list("expires_at", flat=True).first()
    if own is None:
        return expires_at_ms
    last = int(own.timestamp() * 1000)
    if expires_at_ms is not None and expires_at_ms > last:
        raise Forbidden(f"expires_at_ms: a key that ends at {last} makes none that ends later")
    return last if expires_at_ms is None else expires_at_ms


def _moment(milliseconds: int | None) -> datetime.datetime | None:
    if milliseconds is None:
        return None
    try:
        moment = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        raise BadRequest("expires_at_ms: not a moment in Unix milliseconds") from None
    if moment <= datetime.datetime.now(datetime.UTC):
        raise BadRequest("expires_at_ms: that moment has passed")
    return moment
