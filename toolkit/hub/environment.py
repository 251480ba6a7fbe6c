"""The variables of the environment that requests to the Hub depend on, checked before any library reads them."""

from __future__ import annotations

import os
import re
import ssl
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from runner.errors import BloomdeskError, refused

# Whole seconds, as huggingface_hub reads them.
_SECONDS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_PROXY_KINDS = ("http", "https", "socks5", "socks5h")


def check_environment() -> None:
    """Raise `BloomdeskError` for a variable that no request can be made with, by its name and value."""
    check_timeouts()
    for name in _CERTIFICATES:
        value = os.environ.get(name)
        if value and not os.access(value, os.R_OK):
            raise _wrong(name, "cannot be read", f"set {name} to where the certificates are, or unset it")
    file = os.environ.get("SSL_CERT_FILE")
    if file and not _holds_certificates(file):
        hint = "set SSL_CERT_FILE to a file in PEM form, or unset it"
        raise _wrong("SSL_CERT_FILE", "names a file without certificates", hint)
    _check_address("HF_ENDPOINT", ("http", "https"), "https://huggingface.co")
    for upper in _PROXIES:
        for name in (upper.lower(), upper):
            _check_proxy(name)
    _check_token_file()


@cache
def _holds_certificates(file: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
    except OSError:
        return False
    return True


def check_timeouts() -> None:
    """Raise `BloomdeskError` for a variable with which huggingface_hub cannot even be imported."""
    for name in _SECONDS:
        value = os.environ.get(name)
        # 0 is the default.
        if value is not None and not re.fullmatch(r"\s*\+?[0-9]{1,9}\s*", value):
            raise _wrong(name, "is no whole number of seconds", f"set {name} to one, like 10, or unset it")


def _check_proxy(name: str) -> None:
    value = os.environ.get(name, "")
    if "://" not in value:
        # A host alone is a proxy for http.
        return
    if value.startswith("socks://"):
        raise _wrong(name, "names no version of SOCKS", "write it with socks5:// in place of socks://")
    _check_address(name, _PROXY_KINDS, "http://HOST:PORT")
    if value.startswith("socks5") and find_spec("socksio") is None:
        raise _wrong(name, "needs the package socksio", "pip install socksio, or give a proxy for http")


def _check_address(name: str, schemes: tuple[str, ...], example: str) -> None:
    value = os.environ.get(name)
    if not value:
        return
    hint = f"set {name} to an address like {example}, or unset it"
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise _wrong(name, f"is no address: {error}", hint) from None
    if parts.scheme.lower() not in schemes:
        raise _wrong(name, f"is no address that begins with {' or '.join(f'{s}://' for s in schemes)}", hint)
    if not parts.hostname or port == 0:
        raise _wrong(name, "names no host and port", hint)


def _check_token_file() -> None:
    """Raise `BloomdeskError` if there is a file with a token and it cannot be read."""
    if os.environ.get("HF_TOKEN"):
        return
    from huggingface_hub import constants

    try:
        Path(constants.HF_TOKEN_PATH).read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        found = refused(error, "the token of your login cannot be read")
        raise BloomdeskError(found.message, f"{found.hint}; or set HF_TOKEN") from error


def _wrong(name: str, what: str, hint: str) -> BloomdeskError:
    # A proxy's address may hold a password.
    value = re.sub(r"//[^/@]*@", "//...@", os.environ[name])
    return BloomdeskError(f"the environment variable {name} {what}: {value!r}", hint)
