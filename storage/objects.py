"""Objects in S3: put, read by range, look, delete. The only user of boto3.

In charge of: the client and its bounds (every call has a timeout and a fixed number of tries), multipart uploads that
hold one part in memory and can be taken up again, and completing one exactly once. Not in charge of: who may read
an object or what a key means. Hosts hold no credentials: they get URLs signed for one part or object, for an hour.

Works against what S3-compatible servers really do: completing an upload twice is `NoSuchUpload`, so an uncertain
completion is settled by looking at the object; batch deletion wants checksums that not every server agrees on, so
objects are deleted one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from django.conf import settings
from django.core.signals import setting_changed

CONNECT_TIMEOUT_SECONDS: Final = 2.0
READ_TIMEOUT_SECONDS: Final = 10.0
TRIES: Final = 3
COMPLETE_TRIES: Final = 3
CONNECTIONS_PER_PROCESS: Final = 16

PART_BYTES: Final = 8 * 1024 * 1024
"""Size of every part but the last. S3 allows 10,000 parts, so one object may have 80 GB."""
PARTS_MAX: Final = 10_000
RANGE_MAX_BYTES: Final = 64 * 1024 * 1024
URL_SECONDS: Final = 3600
"""How long a host may use a URL."""
UPLOAD_PAGES_MAX: Final = 10
"""Pages of 1,000 unfinished uploads that are looked at in one go."""

_MISSING = frozenset({"404", "NoSuchKey", "NotFound"})
_DENIED = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"})
_FULL = frozenset({"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage"})


class StorageError(Exception):
    """S3 did not do what was asked within its bounds. Trying again later is safe."""

    def __init__(self, what: str, key: str, why: object) -> None:
        super().__init__(f"S3 could not {what} {key!r}: {why}")
        self.key = key

    @property
    def kind(self) -> str:
        """What it was: missing (the bucket, or the object), denied, full, refused, or unreachable."""
        cause = self.__cause__
        if not isinstance(cause, ClientError):
            return "missing" if isinstance(self, ObjectMissing) else "unreachable"
        code, status = _code(cause), cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _MISSING or code in ("NoSuchBucket", "NoSuchUpload"):
            return "missing"
        if code in _DENIED or status in (401, 403):
            return "denied"
        if code in _FULL or status == 507:
            return "full"
        return "unreachable" if status >= 500 or status in (408, 429) else "refused"


class ObjectMissing(StorageError):
    """There is no object of that key."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a look at an object tells. `size` in bytes."""

    size: int
    etag: str


_lock = threading.Lock()
_clients: dict[str, Any] = {}


def _open(endpoint_url: str | None = None) -> Any:
    endpoint_url = endpoint_url or settings.S3["endpoint_url"]
    with _lock:
        if endpoint_url not in _clients:
            _clients[endpoint_url] = boto3.session.Session().client(
                "s3",
                endpoint_url=endpoint_url,
                aws_access_key_id=settings.S3["access_key_id"],
                aws_secret_access_key=settings.S3["secret_access_key"],
                region_name=settings.S3["region"],
                config=Config(
                    signature_version="s3v4",
                    connect_timeout=CONNECT_TIMEOUT_SECONDS,
                    read_timeout=READ_TIMEOUT_SECONDS,
                    retries={"mode": "standard", "total_max_attempts": TRIES},
                    max_pool_connections=CONNECTIONS_PER_PROCESS,
                    s3={"addressing_style": "path"},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        return _clients[endpoint_url]


def _for_hosts(method: str, seconds: int, **what: object) -> str:
    """A URL signed for the address at which hosts reach S3. No request is made for it."""
    endpoint = settings.S3.get("endpoint_for_hosts") or settings.S3["endpoint_url"]
    parameters = {"Bucket": settings.S3["bucket"], **what}
    return str(_open(endpoint).generate_presigned_url(method, Params=parameters, ExpiresIn=seconds))


def part_urls(key: str, upload_id: str, numbers: Iterable[int], seconds: int = URL_SECONDS) -> dict[int, str]:
    """Where a host puts those parts of an upload; the URLs are good for `seconds`."""
    return {
        number: _for_hosts("upload_part", seconds, Key=key, UploadId=upload_id, PartNumber=number) for number in numbers
    }


def object_url(key: str, seconds: int = URL_SECONDS) -> str:
    """Where a host gets an object, whole or by ranges."""
    return _for_hosts("get_object", seconds, Key=key)


def _forget_client(*, setting: str, **_: object) -> None:
    if setting == "S3":
        with _lock:
            _clients.clear()


setting_changed.connect(_forget_client)


def _code(error: BaseException | None) -> str:
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def _call(what: str, key: str, method: str, **arguments: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = getattr(_open(), method)(Bucket=settings.S3["bucket"], **arguments)
    except (ClientError, BotoCoreError) as error:
        if _code(error) in _MISSING:
            raise ObjectMissing(what, key, "there is no such object") from error
        raise StorageError(what, key, error) from error
    return answer


def _encryption() -> dict[str, str]:
    """What asks S3 to encrypt an object at rest; nothing unless S3_ENCRYPTION says so."""
    kind, _, key = str(settings.S3.get("encryption", "")).partition("/")
    if not kind:
        return {}
    return {"ServerSideEncryption": kind, **({"SSEKMSKeyId": key} if key else {})}


def ensure_bucket() -> None:
    """Make the configured bucket if there is none. Raises StorageError."""
    try:
        _call("look at the bucket of", "", "head_bucket")
    except ObjectMissing:
        try:
            _call("make the bucket of", "", "create_bucket")
        except StorageError as error:
            if _code(error.__cause__) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise


def head(key: str) -> ObjectInfo | None:
    """Size and ETag of an object, None when there is none. Raises StorageError."""
    try:
        answer = _call("look at", key, "head_object", Key=key)
    except ObjectMissing:
        return None
    return ObjectInfo(size=int(answer["ContentLength"]), etag=str(answer["ETag"]))


def put(key: str, data: bytes) -> None:
    """Store a small object whole, replacing one of the same key. Raises StorageError."""
    _call("store", key, "put_object", Key=key, Body=data, ContentLength=len(data), **_encryption())


def put_stream(key: str, chunks: Iterable[bytes]) -> int:
    """Store what `chunks` yields, whatever its length, holding one part in memory. Returns its size in bytes.

    The object appears whole or not at all: when `chunks` or S3 fails, the upload is thrown away and the error raised.
    """
    parts = _in_parts(chunks)
    first = next(parts, b"")
    if len(first) < PART_BYTES:
        put(key, first)
        return len(first)
    upload_id = begin_upload(key)
    try:
        etags = [put_part(key, upload_id, 1, first)]
        size = len(first)
        for number, part in enumerate(parts, start=2):
            etags.append(put_part(key, upload_id, number, part))
            size += len(part)
        complete_upload(key, upload_id, etags, size)
    except BaseException:
        abandon_upload(key, upload_id)
        raise
    return size


def _in_parts(chunks: Iterable[bytes]) -> Iterator[bytes]:
    held = bytearray()
    for chunk in chunks:
        held += chunk
        while len(held) >= PART_BYTES:
            yield bytes(held[:PART_BYTES])
            del held[:PART_BYTES]
    if held:
        yield bytes(held)


def begin_upload(key: str) -> str:
    """Begin an upload in parts and return its id, with which any process may go on. Raises StorageError."""
    return str(_call("begin the upload of", key, "create_multipart_upload", Key=key, **_encryption())["UploadId"])


def put_part(key: str, upload_id: str, number: int, data: bytes) -> str:
    """Store part `number` (from 1; all but the last of PART_BYTES) and return its ETag. The same number again replaces
    it. Raises StorageError."""
    if not 1 <= number <= PARTS_MAX:
        raise StorageError("store", key, f"part {number} is over the limit of {PARTS_MAX} parts")
    answer = _call(
        f"store part {number} of",
        key,
        "upload_part",
        Key=key,
        UploadId=upload_id,
        PartNumber=number,
        Body=data,
        ContentLength=len(data),
    )
    return str(answer["ETag"])


def complete_upload(key: str, upload_id: str, etags: list[str], size: int) -> None:
    """Turn the parts into the object; doing it twice is harmless. Raises StorageError.

    An answer that went missing leaves a completed upload that a repeated call would not find, so the object itself
    is looked at before every further try: there with `size` bytes means done.
    """
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, start=1)]
    for left in reversed(range(COMPLETE_TRIES)):
        try:
            _call(
                "complete the upload of",
                key,
                "complete_multipart_upload",
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
            return
        except StorageError as error:
            found = head(key)
            if found is not None and found.size == size:
                return
            if left == 0 or _code(error.__cause__) == "NoSuchUpload":
                raise


def abandon_upload(key: str, upload_id: str) -> None:
    """Throw an unfinished upload away. Best effort: what stays behind is found by `abandon_uploads`."""
    try:
        _call("abandon the upload of", key, "abort_multipart_upload", Key=key, UploadId=upload_id)
    except StorageError:
        pass


def abandon_uploads(prefix: str, older_than_seconds: float) -> int:
    """Throw away the unfinished uploads below `prefix` that nobody can still be at, and return how many there were:
    whoever began them may have died before the id was written down. Raises StorageError."""
    before = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
    found = 0
    marker: dict[str, str] = {}
    for _ in range(UPLOAD_PAGES_MAX):
        page = _call("list the uploads below", prefix, "list_multipart_uploads", Prefix=prefix, **marker)
        for upload in page.get("Uploads", ()):
            if upload["Initiated"] < before:
                abandon_upload(str(upload["Key"]), str(upload["UploadId"]))
                found += 1
        if not page.get("IsTruncated"):
            break
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
    return found


def get_range(key: str, start: int, length: int) -> bytes:
    """Up to `length` bytes from byte `start`; fewer, or none, past the end.

    Raises ObjectMissing, StorageError, and ValueError for a range over RANGE_MAX_BYTES.
    """
    if start < 0 or length < 0 or length > RANGE_MAX_BYTES:
        raise ValueError(f"a range has 0 to {RANGE_MAX_BYTES} bytes, not {length} from {start}")
    if length == 0:
        return b""
    try:
        answer = _call("read", key, "get_object", Key=key, Range=f"bytes={start}-{start + length - 1}")
    except StorageError as error:
        if _code(error.__cause__) in ("InvalidRange", "416"):
            return b""
        raise
    if start > 0 and "ContentRange" not in answer:
        # The whole object from its beginning: taking it for the range would be the wrong bytes.
        answer["Body"].close()
        raise StorageError("read", key, "the server does not serve ranges")
    try:
        data: bytes = answer["Body"].read(length)
    except Exception as error:
        # botocore lets urllib3's and its own errors through here; all of them mean a broken read.
        raise StorageError("read", key, error) from error
    finally:
        answer["Body"].close()
    return data


def delete(key: str) -> None:
    """Delete an object; deleting one that is not there is no error. Raises StorageError."""
    try:
        _call("delete", key, "delete_object", Key=key)
    except ObjectMissing:
        pass


def delete_prefix(prefix: str, limit: int = 10_000) -> int:
    """Delete up to `limit` objects whose keys begin with `prefix`, one by one, and return how many. Call again while
    it returns `limit`. Raises StorageError, and ValueError for an empty prefix, which would mean everything."""
    if not prefix:
        raise ValueError("an empty prefix would delete the whole bucket")
    deleted = 0
    while deleted < limit:
        page = _call("list", prefix, "list_objects_v2", Prefix=prefix, MaxKeys=min(1000, limit - deleted))
        keys = [str(entry["Key"]) for entry in page.get("Contents", ())]
        for key in keys:
            delete(key)
        deleted += len(keys)
        if not keys:
            break
    return deleted
