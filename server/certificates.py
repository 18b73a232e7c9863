"""The coordinator's TLS: an authority of the federation's own, and the server certificates that it signs.

ECDSA P-256. The authority lasts ten years and signs server certificates for this one endpoint only (name constraints
would say so to clients that read them; the sites pin the authority itself, whose digest stands in the roster). A server
certificate lasts 397 days, the most that browsers' rules allow, and is renewed without asking any site.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from confide.errors import ConfigError

__all__ = ["SERVER_DAYS", "WARN_DAYS", "expiry", "host_of", "make_authority", "make_server_certificate"]

AUTHORITY_DAYS, SERVER_DAYS = 3653, 397
#: Days before its end from which a server certificate is warned about; an authority, which takes every operator to
#: renew, from so many.
WARN_DAYS, WARN_AUTHORITY_DAYS = 30, 180
#: Clocks of sites may be a little behind.
_BEFORE = dt.timedelta(hours=1)
_HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)


def host_of(endpoint: str) -> str:
    """The host of `host:port` or `[IPv6]:port`.

    Raises:
        ConfigError: It is neither.
    """
    host, colon, port = endpoint.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host, bare = host[1:-1], False
    else:
        bare = True
    known = _HOST.fullmatch(host) if bare else _is_address(host)
    if not (colon and known and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"{endpoint!r} is not host:port", where="--endpoint",
                          hint="for example fl.example.org:9092, 10.0.0.7:9092, [2001:db8::7]:9092")  # fmt: skip
    return host


def make_authority(federation: str, now: dt.datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A key and its self-signed certificate; it may sign server certificates, and no further authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"confide {federation} authority"[:64])])
    certificate = (
        _builder(name, name, key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def make_server_certificate(
    endpoint: str, authority_key: ec.EllipticCurvePrivateKey, authority: x509.Certificate, now: dt.datetime
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A new key and a certificate for the endpoint's host.

    Raises:
        ConfigError: The authority's own time is over.
    """
    left = authority.not_valid_after_utc - now
    if left < dt.timedelta(days=1):
        raise ConfigError("the certificate authority is at its end", where="ca.crt",
                          hint="make a new one: confide federation renew FOLDER --authority")  # fmt: skip
    host, key = host_of(endpoint), ec.generate_private_key(ec.SECP256R1())
    general: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host)) if _is_address(host) else x509.DNSName(host)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    issuer_id = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(subject, authority.subject, key.public_key(), now, min(SERVER_DAYS, left.days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([general]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return key, certificate


def expiry(server: bytes, authority: bytes, now: dt.datetime) -> str | None:
    """What an operator must know of two certificates (PEM); None while there is time."""
    for pem, what, days, command in (
        (authority, "the certificate authority", WARN_AUTHORITY_DAYS, "confide federation renew FOLDER --authority"),
        (server, "the server certificate", WARN_DAYS, "confide federation renew FOLDER"),
    ):
        end = x509.load_pem_x509_certificate(pem).not_valid_after_utc
        if end - now < dt.timedelta(days=days):
            word = "ended" if end <= now else "ends"
            return f"{what} {word} on {end:%Y-%m-%d}; a new one: {command}"
    return None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: dt.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(**true: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{name: true.get(name, False) for name in names})


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
