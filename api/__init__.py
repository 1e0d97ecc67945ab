"""The frame every endpoint shares: ids, errors, pages, idempotency, long-polls. No domain lives here."""
