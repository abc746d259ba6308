"""
Certificates for the link: making an authority and leaves, loading them, and saying what is wrong with them.

Every daemon has one certificate for the names (DNS or IP) its peer knows it by, and trusts one authority, which is
the cluster's own: no public authority may vouch for a host that can take over a VM. Files are PEM. This module knows
files and X.509; TLS is L{colotx.channel}'s.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from service_identity.cryptography import extract_patterns
from service_identity.exceptions import CertificateError as _UnusableCertificate
from service_identity.exceptions import VerificationError
from service_identity.hazmat import DNS_ID, IPAddress_ID, verify_service_identity

from colotx.errors import CertificateError

AUTHORITY_LIFE = timedelta(days=3652)
"""Ten years: replacing the authority means touching every host."""

LEAF_LIFE = timedelta(days=825)
"""The longest life that common TLS stacks accept for a leaf."""

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
"""What the automatic certificate is for."""

LOCAL_WAIT = 10.0
"""Seconds to wait for another daemon that is just making the local certificates."""

_BACKDATE = timedelta(minutes=5)  # hosts whose clocks differ a little must not refuse a fresh certificate
_INIT = "make an authority with: colo certs init"
_ISSUE = "make one with: colo certs issue"


@dataclass(frozen=True, slots=True)
class Credentials:
    """
    What a daemon shows its peer and judges it by, loaded and checked.

    @ivar authority: the one authority both sides trust.
    @ivar certificate: our own, issued by it.
    @ivar key: the private key of C{certificate}.
    """

    authority: x509.Certificate
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def load(cls, ca: Path, certificate: Path, key: Path, now: datetime | None = None) -> Credentials:
        """
        Read and check three PEM files.

        @param now: when they must be valid; None: at this moment.
        @raise CertificateError: missing, unreadable, expired, not of this authority, or a key that does not fit or
            that everybody can read.
        """
        authority = _loadCertificate(ca, f"the authority's certificate; {_INIT}")
        leaf = _loadCertificate(certificate, f"this host's certificate; {_ISSUE}")
        privateKey = _loadKey(key)
        now = now or datetime.now(UTC)
        _checkLife(ca, authority, now, _INIT)
        _checkLife(certificate, leaf, now, _ISSUE)
        try:
            leaf.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            raise CertificateError(
                f"{certificate} was not issued by the authority in {ca}; {_ISSUE}, with the authority both hosts trust"
            ) from None
        if privateKey.public_key() != leaf.public_key():
            raise CertificateError(f"{key} is not the key of {certificate}; {_ISSUE}")
        return cls(authority, leaf, privateKey)

    def checkName(self, name: str) -> None:
        """
        Make sure that a peer who knows us as C{name} will accept us.

        @raise CertificateError: our certificate is for other names.
        """
        fault = nameFault(self.certificate, name)
        if fault is not None:
            raise CertificateError(f"this host's certificate does not fit: {fault}; {_ISSUE} {name}")


def nameFault(certificate: x509.Certificate, name: str) -> str | None:
    """
    Compare a certificate with a name as RFC 9525 wants it: subjectAltName only, an IP address against IP entries
    only.

    @param name: a DNS name or an IP address, without brackets.
    @return: None when it fits, else what is wrong, in words.
    """
    wanted: DNS_ID | IPAddress_ID
    try:
        wanted = IPAddress_ID(str(ip_address(name)))
    except ValueError:
        wanted = DNS_ID(name)
    try:
        verify_service_identity(extract_patterns(certificate), [wanted], [])
    except (VerificationError, _UnusableCertificate):
        return (
            f"the certificate is for {', '.join(certificateNames(certificate)) or 'no name'}, not for {name}"
        )
    return None


def certificateNames(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    ]


def initAuthority(directory: Path) -> Path:
    """
    Make a new authority: C{ca.pem}, to be copied to both hosts, and C{ca.key} (mode 0600), to be kept apart.

    @return: the certificate's path.
    @raise CertificateError: there is one already, or the files cannot be written.
    """
    path = directory / "ca.pem"
    if path.exists() or (directory / "ca.key").exists():
        raise CertificateError(
            f"{directory} holds an authority already; every certificate depends on it, so move it away by hand first"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "colotx authority")])
    builder = _builder(subject, subject, key, AUTHORITY_LIFE)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(authority=True), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    _writeFile(directory / "ca.key", _keyPem(key), 0o600)
    _writeFile(path, _certificatePem(certificate), 0o644)
    return path


def issue(
    authority: Path, names: Sequence[str], directory: Path, life: timedelta = LEAF_LIFE
) -> tuple[Path, Path, Path]:
    """
    Make a certificate for one host, valid as client and as server.

    @param authority: the directory of L{initAuthority}.
    @param names: DNS names and IP addresses the peer may know the host by; the first one is also its common name.
    @param directory: where C{ca.pem}, C{cert.pem} and C{key.pem} (mode 0600) go. Older ones are replaced.
    @param life: how long it is valid.
    @return: the paths of the three.
    @raise CertificateError: no authority there, a name that is none, or files that cannot be written.
    """
    if not names:
        raise CertificateError(
            "a certificate needs at least one name: the DNS name or IP address the peer uses"
        )
    caCertificate = _loadCertificate(authority / "ca.pem", f"the authority's certificate; {_INIT}")
    caKey = _loadKey(authority / "ca.key", _INIT)
    _checkLife(authority / "ca.pem", caCertificate, datetime.now(UTC), _INIT)
    alternatives = x509.SubjectAlternativeName([_generalName(name) for name in names])
    key = ec.generate_private_key(ec.SECP256R1())
    # X.520 bounds a common name to 64 characters; peers compare the alternative names only.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    builder = _builder(subject, caCertificate.subject, key, life)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(authority=False), critical=True)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
        critical=False,
    )
    builder = builder.add_extension(alternatives, critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(caKey.public_key()), critical=False
    )
    certificate = builder.sign(caKey, hashes.SHA256())
    paths = directory / "ca.pem", directory / "cert.pem", directory / "key.pem"
    _writeFile(paths[0], _certificatePem(caCertificate), 0o644)
    _writeFile(paths[2], _keyPem(key), 0o600)
    _writeFile(paths[1], _certificatePem(certificate), 0o644)
    return paths


def localCredentials(directory: Path) -> Credentials:
    """
    The credentials of daemons that talk over loopback only: made at first use, renewed when they no longer work.
    Both daemons must name the same directory; they may start at the same moment. May block for L{LOCAL_WAIT}.

    @param directory: a state directory that only the daemons' user can write to.
    @raise CertificateError: the files cannot be written, or another process holds the lock.
    """
    paths = directory / "ca.pem", directory / "cert.pem", directory / "key.pem"
    with _locked(directory / "lock"):
        with contextlib.suppress(CertificateError):
            return Credentials.load(*paths)
        try:
            issue(directory, LOCAL_NAMES, directory)
        except CertificateError:
            # The local authority is missing, half made by a crash, or expired; nobody else depends on it.
            for name in ("ca.pem", "ca.key"):
                (directory / name).unlink(missing_ok=True)
            initAuthority(directory)
            issue(directory, LOCAL_NAMES, directory)
        return Credentials.load(*paths)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    _makeDirectory(path.parent)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise CertificateError(f"{path} cannot be opened: {e.strerror}") from e
    try:
        deadline = time.monotonic() + LOCAL_WAIT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CertificateError(
                        f"another process has held {path} for {LOCAL_WAIT:g} s; end it, or name another directory"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(lock)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, life: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now - _BACKDATE, now + life - _BACKDATE))
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _generalName(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        pass
    try:
        if name:
            return x509.DNSName(name.encode("idna").decode("ascii"))
    except UnicodeError:
        pass
    raise CertificateError(f"{name!r} is neither a DNS name nor an IP address")


def _certificatePem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _keyPem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(f"{path} is missing: {what}") from None
    except OSError as e:
        raise CertificateError(f"{path} cannot be read ({e.strerror}): {what}") from e


def _loadCertificate(path: Path, what: str) -> x509.Certificate:
    data = _read(path, what)
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise CertificateError(f"{path} is no PEM certificate: {what}") from None


def _loadKey(path: Path, remedy: str = _ISSUE) -> ec.EllipticCurvePrivateKey:
    data = _read(path, f"a private key; {remedy}")
    if path.stat().st_mode & 0o007:
        raise CertificateError(
            f"everybody on this host can use the private key {path}; run: chmod 600 {path}"
        )
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):  # TypeError: it has a password
        raise CertificateError(f"{path} is no PEM private key without a password; {remedy}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path} is no elliptic curve key; {remedy}")
    return key


def _checkLife(path: Path, certificate: x509.Certificate, now: datetime, remedy: str) -> None:
    if now > certificate.not_valid_after_utc:
        raise CertificateError(f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {remedy}")
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{path} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; "
            "set this host's clock right"
        )


def _makeDirectory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise CertificateError(f"{directory} cannot be made: {e.strerror}") from e


def _writeFile(path: Path, data: bytes, mode: int) -> None:
    """Write a file so that nobody ever sees a part of it, nor a key with a wider mode."""
    _makeDirectory(path.parent)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") as file:
                os.fchmod(handle, mode)
                file.write(data)
                file.flush()
                os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as e:
        raise CertificateError(f"{path} cannot be written: {e.strerror}") from e
