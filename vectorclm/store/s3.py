"""How an S3 store is spoken to: what is tried again and for how long, and what to do where it fails.

Endpoint, keys, profile, role, region, certificates and the style of addresses are read by botocore itself, from the
usual variables and files (AWS_ENDPOINT_URL, AWS_PROFILE, AWS_CONFIG_FILE, AWS_WEB_IDENTITY_TOKEN_FILE, …).
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
PATIENT, QUICK = 10, 3  # requests until one is given up: in the middle of work, about a minute; before any work begins
CONNECT_SECONDS, READ_SECONDS = 10.0, 20.0  # a server that is silent for longer is asked again
LARGEST_PUT = 5 * 2**30  # in one request, whose condition every server that has conditions honours
PART_BYTES, PARTS = 16 * 2**20, 4  # of a large file, how much goes at once, and how many at a time

TRIES = 4  # to move a file whole: what arrives otherwise is sent or fetched again
GARBLED = "arrived otherwise than it was sent, again and again: see to the network, or to the server's disk and memory"

OTHER_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
RENEW = "the credentials have expired: renew AWS_SESSION_TOKEN with its keys, or what AWS_PROFILE names"
DENIED = "these credentials may not do that there: allow them s3:GetObject, PutObject, DeleteObject and ListBucket, or "
REGION = "the bucket is in another region, or at another server: set AWS_DEFAULT_REGION, or AWS_ENDPOINT_URL"
CLOCK = "this machine's clock is too far from the server's: set it, as by NTP"
BUCKET = "there is no such bucket: `vectorclm store create` makes it; or correct --store or VECTORCLM_STORE"
SECRET = "the secret is not that of the key: set AWS_SECRET_ACCESS_KEY"
ADVICE = {  # by the server's error code, or the client's exception
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
    "InvalidBucketName": "this is no name for a bucket: correct --store or VECTORCLM_STORE",
    "AuthorizationHeaderMalformed": REGION,
    "PermanentRedirect": REGION,
    "301": REGION,
    "IllegalLocationConstraintException": REGION,
    "SlowDown": "the server asks for fewer requests, and went on to: try later",
    "503": "the server asks for fewer requests, and went on to: try later",
    "NoCredentialsError": f"there are no credentials: {OTHER_KEYS}",
    "PartialCredentialsError": f"of the credentials, one half is missing: {OTHER_KEYS}",
    "CredentialRetrievalError": "the program or role behind AWS_PROFILE gives no credentials: run it by hand",
    "ProfileNotFound": "AWS_PROFILE names a profile that is not in AWS_CONFIG_FILE",
    "TokenRetrievalError": RENEW,
    "SSOTokenLoadError": RENEW,
    "UnauthorizedSSOTokenError": RENEW,
    "EndpointConnectionError": "nothing answers there: set AWS_ENDPOINT_URL, or start the server",
    "ConnectTimeoutError": "nothing answers there: set AWS_ENDPOINT_URL, or see to the network",
    "ReadTimeoutError": "the server falls silent, again and again: see to it, or to the network",
    "SSLError": "TLS fails: AWS_ENDPOINT_URL says https:// where the server speaks http://, or AWS_CA_BUNDLE must name "
    "the file with the server's authority",
    "HTTPClientError": "the connection fails: see AWS_ENDPOINT_URL, AWS_CA_BUNDLE and HTTPS_PROXY",
}


def options(protocol: str, attempts: int) -> dict[str, Any]:
    """Arguments for the file system of a store; nothing where it is not S3."""
    if protocol not in PROTOCOLS:
        return {}
    # `standard` waits longer each time, with chance, and counts 500, 502, 503 and 504, resets and silence as passing.
    retries = {"mode": "standard", "total_max_attempts": attempts}
    timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
    return {"config_kwargs": {"retries": retries, **timeouts}}


@contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """Raise StoreError with what to change, in a line, for whatever a remote store's client raises in this block.

    An object that is missing, or there already, stays a FileNotFoundError or FileExistsError.
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
    """What a client's error means for the person who set it up; without any value of a setting but the endpoint."""
    said = re.sub(r"//[^/@\s]*@", "//…@", str(error.__cause__ or error)).strip() or type(error).__name__
    for kind in (code(error), *(cls.__name__ for cls in type(error).__mro__)):
        if kind in ADVICE:
            return f"{ADVICE[kind]} ({said})"
    if isinstance(error, ValueError) and "endpoint" in said:
        return f"AWS_ENDPOINT_URL is no address such as https://host:port ({said})"
    return f"{type(error).__name__}: {said}"


NO_CONDITIONS = ("NotImplemented", "501", "InvalidArgument")  # where a server does not know If-Match


def refused_by_condition(error: OSError) -> bool:
    """Whether a write that was to create an object failed because there is one, or another writer is about to win."""
    conditions = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
    return isinstance(error, FileExistsError) or code(error) in conditions


def create(fs: Any, source: Path, path: str) -> None:
    """Send a file to an S3 path at which there is none (If-None-Match). Raises FileExistsError where there is one.

    The server compares its MD5, so that a bit which turns on the way makes no object.
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
    """The bytes of a small S3 object and what the server calls this state of it (ETag); None where there is none."""
    bucket, _, key = path.partition("/")
    try:
        tag = tag_of(fs.call_s3("head_object", Bucket=bucket, Key=key))
        data = bytes(fs.cat_file(path, max_concurrency=1))
    except FileNotFoundError:
        return None, ""
    # A state between the two is none that was asked for, and is refused then.
    return data, tag


def tag_of(answer: Mapping[str, Any]) -> str:
    """The ETag in a server's answer, without its quotes, as some servers compare it only so."""
    return str(answer["ETag"]).strip('"')


def code(error: BaseException) -> str:
    """The server's word for what went wrong, such as `NoSuchKey`; empty where no server said it."""
    response = getattr(error.__cause__ or error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
