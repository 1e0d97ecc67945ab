"""``manage.py rotate_seals``: puts every secret at rest under the first key of BERTH_SEAL_KEYS.

To rotate: put a new key in front of BERTH_SEAL_KEYS everywhere, restart every role, run this, drop the old key.
"""

from __future__ import annotations

from typing import Any

from django.apps import apps
from django.core.management.base import BaseCommand, CommandError
from django.db.models import BinaryField

from accounts.sealing import SealBroken, reseal


class Command(BaseCommand):
    help = "Reseal all secrets with the first key of BERTH_SEAL_KEYS."

    def handle(self, *args: Any, **options: Any) -> None:
        done, broken = 0, []
        for model in apps.get_models():
            for field in model._meta.fields:
                if not isinstance(field, BinaryField) or not field.name.endswith("_sealed"):
                    continue
                rows = model._default_manager.exclude(**{field.name: None}).values_list("pk", field.name)
                for key, sealed in rows.iterator(chunk_size=200):
                    if not sealed:
                        continue
                    try:
                        fresh = reseal(sealed)
                    except SealBroken:
                        broken.append(f"{model._meta.label} {key} {field.name}")
                        continue
                    # The old value in the filter: whoever changed it meanwhile sealed it with the new key already.
                    same = model._default_manager.filter(**{"pk": key, field.name: sealed})
                    done += same.update(**{field.name: fresh})
        self.stdout.write(f"{done} secrets resealed")
        if broken:
            raise CommandError("no key opens: " + ", ".join(broken))
