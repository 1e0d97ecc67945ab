"""The SQL of the engine, written once per table from its model.

In charge of: the text of claim, settle, wake and their kin. Not in charge of: when each is run (`flows.engine`).

Two fragments recur. FENCE is never a plain `+ 1`: that would repeat a number after an asynchronous commit was lost or
a database restored, and hosts that kept the higher one would then refuse everything. RELAXED, in a RETURNING list,
makes that one statement's commit asynchronous with no extra round trip: what a crash of PostgreSQL may lose by it is a
claim or a settle, and a step may run twice anyway.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from django.db import connection, models

from flows.outcomes import DatabaseNow

LEASE_SECONDS = 10
FENCE = "greatest({0}fence + 1, (extract(epoch from clock_timestamp()) * 1000000)::bigint)"
RELAXED = "set_config('synchronous_commit', 'off', true)"
FREE = "(lease_until IS NULL OR lease_until < now())"


@dataclass(frozen=True, slots=True)
class Alongside:
    """A statement that must be true together with a settle: an INSERT, UPDATE or DELETE that selects from `settled`
    (one row with the column `id`, or none when the lease was lost)."""

    sql: str
    params: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Assignments:
    """The SET list for some columns: its text, and the parameters that belong to it."""

    names: frozenset[str]
    sql: str
    params: tuple[object, ...]


class Table:
    """The statements of one durable model; `payload` are the attribute names that a claim returns besides its own."""

    def __init__(self, model: type[models.Model], payload: Sequence[str]) -> None:
        self.model = model
        self.name = connection.ops.quote_name(model._meta.db_table)
        self.payload = tuple(payload)
        self._fields = {name: model._meta.get_field(name) for name in payload}
        self._loaders = {
            index: field for index, field in enumerate(self._fields.values()) if hasattr(field, "from_db_value")
        }

    def column(self, name: str) -> str:
        """The quoted column of an attribute (`host` and `host_id` are the same one)."""
        return connection.ops.quote_name(self._field(name).column)

    def _field(self, name: str) -> Any:
        return self._fields.get(name) or self.model._meta.get_field(name)

    def prepare(self, name: str, value: object) -> object:
        """A Python value as the driver wants it for that column (JSON and bytes need their wrappers)."""
        return self._field(name).get_db_prep_save(value, connection)

    def load(self, values: Sequence[Any]) -> list[Any]:
        """The payload of a claimed row, as Python values."""
        loaded = list(values)
        for index, field in self._loaders.items():
            loaded[index] = field.from_db_value(loaded[index], None, connection)
        return loaded

    def assign(self, columns: Mapping[str, object]) -> Assignments:
        """The SET list for learnt columns."""
        parts: list[str] = []
        params: list[object] = []
        for name, value in columns.items():
            if isinstance(value, DatabaseNow):
                parts.append(f"{self.column(name)} = now() + make_interval(secs => %s)")
                params.append(value.plus)
            else:
                parts.append(f"{self.column(name)} = %s")
                params.append(self.prepare(name, value))
        return Assignments(frozenset(columns), ", ".join(parts), tuple(params))

    def _payload_sql(self, prefix: str = "") -> str:
        return "".join(f", {prefix}{self.column(name)}" for name in self.payload)

    def _claimed(self, prefix: str) -> tuple[str, str]:
        sets = (
            f"lease = %s, lease_until = now() + interval '{LEASE_SECONDS} s', fence = {FENCE.format(prefix)}, "
            f"attempts = {prefix}attempts + ({prefix}lease IS NOT NULL)::int"
        )
        returning = (
            f"{RELAXED}, {prefix}id, {prefix}step, {prefix}fence, {prefix}wakes, {prefix}attempts, {prefix}lease, "
            f"clock_timestamp(), {prefix}step_since, coalesce({prefix}deadline_at <= now(), false)"
            + self._payload_sql(prefix)
        )
        return sets, returning

    @cached_property
    def claim(self) -> str:
        """Parameters: lease, id."""
        sets, returning = self._claimed("")
        return f"UPDATE {self.name} SET {sets} WHERE id = %s AND wake_at <= now() AND {FREE} RETURNING {returning}"

    @cached_property
    def claim_due(self) -> str:
        """Parameters: seconds overdue, limit, lease."""
        sets, returning = self._claimed("d.")
        return (
            f"WITH due AS (SELECT id FROM {self.name} WHERE wake_at <= now() - make_interval(secs => %s) AND {FREE} "
            f"ORDER BY wake_at LIMIT %s FOR UPDATE SKIP LOCKED) "
            f"UPDATE {self.name} d SET {sets} FROM due WHERE d.id = due.id RETURNING {returning}"
        )

    @cached_property
    def renew(self) -> str:
        """Parameters: ids, leases, fences. Returns the ids still held."""
        return (
            f"UPDATE {self.name} t SET lease_until = now() + interval '{LEASE_SECONDS} s' "
            "FROM unnest(%s::text[], %s::text[], %s::bigint[]) AS x(id, lease, fence) "
            f"WHERE t.id = x.id AND t.lease = x.lease AND t.fence = x.fence RETURNING t.id, {RELAXED}"
        )

    @cached_property
    def wake(self) -> str:
        """Parameters: ids. Returns those that a nudge helps (nobody holds them)."""
        return (
            f"UPDATE {self.name} SET wakes = wakes + 1, wake_at = now() WHERE id = ANY(%s) AND wake_at IS NOT NULL "
            f"RETURNING id, {FREE}"
        )

    def refused(self, name: str) -> str:
        """Parameters: the value of column `name`. The ids of rows that sleep after a failed try."""
        return (
            f"SELECT id FROM {self.name} WHERE wake_at > now() AND attempts > 0 AND lease IS NULL "
            f"AND {self.column(name)} = %s"
        )

    @cached_property
    def retry(self) -> str:
        """Parameters: wakes at claim, seconds, code, detail, id, lease, fence."""
        return (
            f"UPDATE {self.name} SET attempts = attempts + 1, lease = NULL, lease_until = NULL, "
            "wake_at = CASE WHEN wakes = %s THEN now() + make_interval(secs => %s) ELSE now() END, "
            "error_code = %s, error_detail = %s WHERE id = %s AND lease = %s AND fence = %s "
            f"RETURNING wake_at <= now(), {RELAXED}"
        )

    @staticmethod
    def _sets(own: Mapping[str, str], learnt: Assignments) -> str:
        parts = [text for name, text in own.items() if name not in learnt.names]
        return ", ".join([*parts, learnt.sql] if learnt.sql else parts)

    def _guarded(self, sets: str, returning: str, alongside: Alongside | None, relaxed: bool) -> str:
        """The guarded UPDATE. Its row: commit setting, id, then `returning`."""
        commit = RELAXED if relaxed else "NULL"
        update = f"UPDATE {self.name} SET {sets} WHERE id = %s AND lease = %s AND fence = %s RETURNING "
        if alongside is None:
            return f"{update}{commit}, id, {returning}"
        return (
            f"WITH settled AS ({update}id, {returning}), noted AS ({alongside.sql}) "
            f"SELECT {commit}, settled.* FROM settled"
        )

    def settle(self, learnt: Assignments, alongside: Alongside | None) -> str:
        """Parameters: step, step, wakes at claim, seconds, learnt…, id, lease, fence, alongside…"""
        sets = self._sets(
            {
                "step": "step = %s",
                "step_since": "step_since = CASE WHEN step = %s THEN step_since ELSE now() END",
                "wake_at": "wake_at = CASE WHEN wakes = %s THEN now() + make_interval(secs => %s) ELSE now() END",
                "attempts": "attempts = 0",
                "lease": "lease = NULL",
                "lease_until": "lease_until = NULL",
                "error_code": "error_code = NULL",
                "error_detail": "error_detail = NULL",
            },
            learnt,
        )
        return self._guarded(sets, "wake_at <= now() AS due", alongside, relaxed=True)

    def settle_next(self, learnt: Assignments, alongside: Alongside | None) -> str:
        """Parameters: step, step, learnt…, id, lease, fence, alongside…"""
        sets = self._sets(
            {
                "step": "step = %s",
                "step_since": "step_since = CASE WHEN step = %s THEN step_since ELSE now() END",
                "wake_at": "wake_at = now()",
                "attempts": "attempts = 0",
                "lease_until": f"lease_until = now() + interval '{LEASE_SECONDS} s'",
                "error_code": "error_code = NULL",
                "error_detail": "error_detail = NULL",
            },
            learnt,
        )
        returning = "wakes, clock_timestamp() AS clock, step_since, coalesce(deadline_at <= now(), false) AS expired"
        # An end that others are told of is as durable here as in `done`.
        relaxed = "completed_at" not in learnt.names
        return self._guarded(sets, returning + self._payload_sql(), alongside, relaxed=relaxed)

    def done(self, learnt: Assignments, alongside: Alongside | None) -> str:
        """Parameters: step, step, learnt…, id, lease, fence, alongside…"""
        sets = self._sets(
            {
                "step": "step = %s",
                "step_since": "step_since = CASE WHEN step = %s THEN step_since ELSE now() END",
                "wake_at": "wake_at = NULL",
                "lease": "lease = NULL",
                "lease_until": "lease_until = NULL",
                "attempts": "attempts = 0",
                "completed_at": "completed_at = now()",
                "error_code": "error_code = NULL",
                "error_detail": "error_detail = NULL",
            },
            learnt,
        )
        return self._guarded(sets, "false AS due", alongside, relaxed=False)

    def request(self, learnt: Assignments, guard: str, alongside: Alongside | None) -> str:
        """Parameters: learnt…, id, guard…, alongside…. Takes the row from whoever holds it."""
        sets = self._sets(
            {
                "wakes": "wakes = wakes + 1",
                "wake_at": "wake_at = now()",
                "lease": "lease = NULL",
                "lease_until": "lease_until = NULL",
                "attempts": "attempts = 0",
                "fence": f"fence = {FENCE.format('')}",
            },
            learnt,
        )
        update = f"UPDATE {self.name} SET {sets} WHERE id = %s AND completed_at IS NULL AND ({guard}) RETURNING id"
        if alongside is None:
            return update
        return f"WITH settled AS ({update}), noted AS ({alongside.sql}) SELECT id FROM settled"

    def finish(self, names: Sequence[str]) -> str:
        """Parameters: ids, one array per name, step. A batch; the lease of whoever holds a row is cleared."""
        types = ["text[]", *(f"{self._field(name).db_type(connection)}[]" for name in names)]
        arrays = ", ".join(f"%s::{kind}" for kind in types)
        inner = ", ".join(["id", *(f"c{index}" for index in range(len(names)))])
        sets = "".join(f", {self.column(name)} = x.c{index}" for index, name in enumerate(names))
        return (
            f"UPDATE {self.name} t SET step = %s, step_since = now(), completed_at = now(), wake_at = NULL, "
            f"lease = NULL, lease_until = NULL{sets} FROM unnest({arrays}) AS x({inner}) "
            "WHERE t.id = x.id AND t.completed_at IS NULL RETURNING t.id"
        )


def payload_names(row: type, engine_row: type) -> list[str]:
    """The fields a flow's row class adds to the engine's own."""
    own = {item.name for item in fields(engine_row)}
    return [item.name for item in fields(row) if item.name not in own]
