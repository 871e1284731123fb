"""S3 access: retries, conditional writes, and advice for each error.

botocore itself reads endpoint, keys, profile, role, region, certificates and the style of addresses from the usual
variables and files (AWS_ENDPOINT_URL, AWS_PROFILE, AWS_CONFIG_FILE, AWS_WEB_IDENTITY_TOKEN_FILE, …).
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vectorclm.errors import StoreError

PROTOCOLS = ("s3", "s3a")
PATIENT, QUICK = 10, 3  # attempts of a request: about a minute during the work; fewer before the work begins
CONNECT_SECONDS, READ_SECONDS = 10.0, 20.0  # a server that is silent for longer gets a retry
LARGEST_PUT = 5 * 2**30  # bytes of one request, whose condition every server with conditional writes honours
PART_BYTES, PARTS = 16 * 2**20, 4  # of a multipart upload: bytes of a part, and parts in parallel

TRIES = 4  # transfers of a file, until its hash is right
GARBLED = "arrived damaged several times: check the network, and the server's disk and memory"

OTHER_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
RENEW = "the credentials have expired: renew AWS_SESSION_TOKEN with its keys, or what AWS_PROFILE names"
DENIED = "these credentials lack the rights: allow s3:GetObject, PutObject, DeleteObject and ListBucket, or "
REGION = "the bucket is in another region, or on another server: set AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL"
CLOCK = "this machine's clock differs too much from the server's: set it, for example by NTP"
BUCKET = "there is no such bucket: `vectorclm store create` creates it; or correct --store or VECTORCLM_STORE"
SECRET = "the secret does not belong to the key: set AWS_SECRET_ACCESS_KEY"
ADVICE = {  # by the server's error code or the class of the client's exception
    "InvalidAccessKeyId": f"the server does not know this access key: {OTHER_KEYS}",
    "SignatureDoesNotMatch": SECRET,
    "RequestTimeTooSkewed": CLOCK,
    "ExpiredToken": RENEW,
    "ExpiredTokenException": RENEW,
    "TokenRefreshRequired": RENEW,
    "InvalidToken": RENEW,
    "AccessDenied": DENIED + OTHER_KEYS,
    "AllAccessDisabled": DENIED + OTHER_KEYS,
    "403": DENIED + OTHER_KEYS,
    "NoSuchBucket": BUCKET,
    "InvalidBucketName": "this is not a valid bucket name: correct --store or VECTORCLM_STORE",
    "AuthorizationHeaderMalformed": REGION,
    "PermanentRedirect": REGION,
    "301": REGION,
    "IllegalLocationConstraintException": REGION,
    "SlowDown": "the server limits the request rate: try later",
    "503": "the server limits the request rate: try later",
    "NoCredentialsError": f"there are no credentials: {OTHER_KEYS}",
    "PartialCredentialsError": f"one half of the credentials is missing: {OTHER_KEYS}",
    "CredentialRetrievalError": "the program or role behind AWS_PROFILE returns no credentials: check it by hand",
    "ProfileNotFound": "AWS_PROFILE names a profile that is not in AWS_CONFIG_FILE",
    "TokenRetrievalError": RENEW,
    "SSOTokenLoadError": RENEW,
    "UnauthorizedSSOTokenError": RENEW,
    "EndpointConnectionError": "nothing answers there: set AWS_ENDPOINT_URL, or start the server",
    "ConnectTimeoutError": "nothing answers there: set AWS_ENDPOINT_URL, or check the network",
    "ReadTimeoutError": "the server stopped answering several times: check the server and the network",
    "SSLError": "TLS fails: AWS_ENDPOINT_URL says https:// where the server speaks http://, or AWS_CA_BUNDLE must name "
    "the file with the server's authority",
    "HTTPClientError": "the connection fails: check AWS_ENDPOINT_URL, AWS_CA_BUNDLE and HTTPS_PROXY",
}


def options(protocol: str, attempts: int) -> dict[str, Any]:
    """Arguments for the file system of an S3 store; empty for other protocols."""
    if protocol not in PROTOCOLS:
        return {}
    # `standard` backs off exponentially with jitter, and retries 500, 502, 503, 504, resets and timeouts.
    retries = {"mode": "standard", "total_max_attempts": attempts}
    timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
    return {"config_kwargs": {"retries": retries, **timeouts}}


@contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """Raise StoreError, with advice in one line, for any error that a remote store's client raises in this block.

    FileNotFoundError and FileExistsError of an object pass unchanged.
    """
    try:
        yield
    except (StoreError, FileExistsError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and code(error) != "NoSuchBucket":
            raise
        raise StoreError(f"{where}: {explain(error)}") from error


def explain(error: Exception) -> str:
    """The advice for a client's error. The text contains no setting's value except the endpoint."""
    message = re.sub(r"//[^/@\s]*@", "//…@", str(error.__cause__ or error)).strip() or type(error).__name__
    for kind in (code(error), *(cls.__name__ for cls in type(error).__mro__)):
        if kind in ADVICE:
            return f"{ADVICE[kind]} ({message})"
    if isinstance(error, ValueError) and "endpoint" in message:
        return f"AWS_ENDPOINT_URL is not an address such as https://host:port ({message})"
    return f"{type(error).__name__}: {message}"


OUTAGES = {  # error codes of a server that cannot answer now, and classes of the errors of failed connections
    *("500", "502", "503", "504", "InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout"),
    *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"),
    *("ConnectionError", "ClientConnectionError", "FSTimeoutError", "TimeoutError"),
}


def is_outage(error: StoreError) -> bool:
    """Whether a store's error is one that passes: its server, or the network before it, is away."""
    chain = [cause for cause in (error.__cause__, getattr(error.__cause__, "__cause__", None)) if cause is not None]
    return any(not OUTAGES.isdisjoint({code(one), *(kind.__name__ for kind in type(one).__mro__)}) for one in chain)


NO_CONDITIONS = ("NotImplemented", "501", "InvalidArgument")  # error codes of servers that do not know If-Match


def refused_by_condition(error: OSError) -> bool:
    """Whether a conditional write failed because the object exists, or because another writer is about to win."""
    conditions = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
    return isinstance(error, FileExistsError) or code(error) in conditions


def create(fs: Any, source: Path, path: str) -> None:
    """Create an S3 object from a file, only if absent (If-None-Match). Raises FileExistsError where it exists.

    The server compares the MD5, so that a bit flipped in transfer creates no object.
    """
    bucket, _, key = path.partition("/")
    for _ in range(TRIES):
        with source.open("rb") as file:
            md5 = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
            file.seek(0)
            try:
                fs.call_s3("put_object", Bucket=bucket, Key=key, Body=file, ContentMD5=md5, IfNoneMatch="*")
                return
            except OSError as error:
                if refused_by_condition(error):
                    raise FileExistsError(path) from error
                if code(error) != "BadDigest":
                    raise
    raise StoreError(f"{path} {GARBLED}")


def read_tagged(fs: Any, path: str) -> tuple[bytes | None, str]:
    """The bytes of a small S3 object and the ETag of this state; None and an empty tag where there is none."""
    bucket, _, key = path.partition("/")
    try:
        tag = tag_of(fs.call_s3("head_object", Bucket=bucket, Key=key))
        data = bytes(fs.cat_file(path, max_concurrency=1))
    except FileNotFoundError:
        return None, ""
    # Where the object changes between the two requests, a write on this tag is refused.
    return data, tag


def tag_of(answer: Mapping[str, Any]) -> str:
    """The ETag in a server's answer, without its quotes: some servers compare only that form."""
    return str(answer["ETag"]).strip('"')


def code(error: BaseException) -> str:
    """The server's error code, such as `NoSuchKey`; empty where the error is not the server's."""
    response = getattr(error.__cause__ or error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
