"""
Tests for L{colotx.certificates}.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from colotx import certificates
from colotx.certificates import (
    Credentials,
    certificateNames,
    initAuthority,
    issue,
    localCredentials,
    nameFault,
)
from colotx.errors import CertificateError


class CertificateCase(SynchronousTestCase):
    def setUp(self):
        self.directory = Path(self.mktemp())
        self.authority = self.directory / "ca"
        initAuthority(self.authority)

    def issue(self, *names, **options):
        return issue(self.authority, names or ("host.example",), self.directory / "host", **options)

    def assertRefused(self, words, function, *arguments, **options):
        error = self.assertRaises(CertificateError, function, *arguments, **options)
        self.assertIn(words, str(error))
        self.assertNotIn("\n", str(error))
        return error


class MakingTests(CertificateCase):
    def test_issued(self):
        """A leaf has the names asked for, is good for both ends of TLS, and chains to the authority."""
        credentials = Credentials.load(*self.issue("host.example", "192.0.2.7", "2001:db8::7"))
        leaf = credentials.certificate
        self.assertEqual(certificateNames(leaf), ["host.example", "192.0.2.7", "2001:db8::7"])
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        self.assertEqual({u._name for u in usage}, {"serverAuth", "clientAuth"})
        self.assertFalse(leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
        self.assertIsInstance(credentials.key.curve, ec.SECP256R1)
        life = leaf.not_valid_after_utc - datetime.now(UTC)
        self.assertTrue(timedelta(days=824) < life <= timedelta(days=825))
        authority = credentials.authority
        self.assertTrue(authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
        self.assertGreater(authority.not_valid_after_utc - datetime.now(UTC), timedelta(days=3650))

    def test_openssl(self):
        """OpenSSL's own verification agrees, for both purposes and both kinds of name."""
        if shutil.which("openssl") is None:
            raise SkipTest("no openssl command here")
        ca, certificate, _ = self.issue("host.example", "192.0.2.7")
        for purpose in "sslserver", "sslclient":
            for name in ("-verify_hostname", "host.example"), ("-verify_ip", "192.0.2.7"):
                subprocess.run(
                    [
                        "openssl",
                        "verify",
                        "-x509_strict",
                        "-purpose",
                        purpose,
                        *name,
                        "-CAfile",
                        ca,
                        certificate,
                    ],
                    check=True,
                    capture_output=True,
                    timeout=10,
                )

    def test_modes(self):
        """Keys are for their owner only, whatever the umask."""
        before = os.umask(0)
        self.addCleanup(os.umask, before)
        *_, key = self.issue()
        for path in key, self.authority / "ca.key":
            self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)
        self.assertEqual([p.name for p in key.parent.iterdir() if p.name.startswith(".")], [])

    def test_authorityIsKept(self):
        """An authority is never overwritten."""
        before = (self.authority / "ca.pem").read_bytes()
        self.assertRefused("holds an authority already", initAuthority, self.authority)
        self.assertEqual((self.authority / "ca.pem").read_bytes(), before)

    def test_reissue(self):
        """Issuing again replaces the leaf."""
        first = self.issue()[1].read_bytes()
        self.assertNotEqual(self.issue()[1].read_bytes(), first)
        Credentials.load(*self.issue())

    def test_noAuthority(self):
        error = self.assertRefused("ca.pem is missing", issue, self.directory / "none", ["a"], self.directory)
        self.assertIn("colo certs init", str(error))

    def test_badNames(self):
        self.assertRefused("at least one name", issue, self.authority, [], self.directory)
        for name in "", "a" * 64 + ".example", "a..b":
            self.assertRefused("neither a DNS name nor an IP address", self.issue, name)

    def test_longName(self):
        """A DNS name longer than a common name may be."""
        name = ".".join(["a" * 60, "b" * 60, "example"])
        self.assertIsNone(nameFault(Credentials.load(*self.issue(name)).certificate, name))

    def test_unwritable(self):
        (self.directory / "file").write_text("")
        self.assertRefused("cannot be made", issue, self.authority, ["a"], self.directory / "file" / "x")


class LoadingTests(CertificateCase):
    def test_missing(self):
        for n, remedy in enumerate(["colo certs init", "colo certs issue", "colo certs issue"]):
            paths = self.issue()
            paths[n].unlink()
            self.assertIn(remedy, str(self.assertRefused(f"{paths[n]} is missing", Credentials.load, *paths)))

    def test_unreadable(self):
        for n in range(3):
            paths = self.issue()
            paths[n].unlink()
            paths[n].mkdir()
            self.assertRefused(f"{paths[n]} cannot be read (Is a directory)", Credentials.load, *paths)
            paths[n].rmdir()
            paths[n].touch()

    def test_garbage(self):
        for n, words in enumerate(["no PEM certificate", "no PEM certificate", "no PEM private key"]):
            paths = self.issue()
            paths[n].write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n")
            self.assertRefused(words, Credentials.load, *paths)

    def test_expired(self):
        paths = self.issue(life=timedelta(seconds=-1))
        self.assertRefused("cert.pem expired on", Credentials.load, *paths)
        paths = self.issue()
        self.assertRefused(
            "ca.pem expired on", Credentials.load, *paths, now=datetime.now(UTC) + timedelta(days=4000)
        )
        self.assertRefused(
            "set this host's clock right", Credentials.load, *paths, now=datetime.now(UTC) - timedelta(days=1)
        )

    def test_otherAuthority(self):
        _, certificate, key = self.issue()
        other = initAuthority(self.directory / "other")
        self.assertRefused("was not issued by the authority", Credentials.load, other, certificate, key)

    def test_otherKey(self):
        first = self.issue()
        second = issue(self.authority, ["b"], self.directory / "second")
        self.assertRefused("is not the key of", Credentials.load, first[0], first[1], second[2])

    def test_openKey(self):
        paths = self.issue()
        paths[2].chmod(0o644)
        self.assertRefused("chmod 600", Credentials.load, *paths)
        paths[2].chmod(0o640)
        Credentials.load(*paths)

    def test_otherKeys(self):
        """Keys with a password or of another kind are refused in words."""
        paths = self.issue()
        locked = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
        paths[2].write_bytes(locked)
        self.assertRefused("without a password", Credentials.load, *paths)
        foreign = rsa.generate_private_key(65537, 2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        paths[2].write_bytes(foreign)
        self.assertRefused("no elliptic curve key", Credentials.load, *paths)


class NameTests(CertificateCase):
    def test_names(self):
        certificate = Credentials.load(*self.issue("host.example", "192.0.2.7", "2001:db8::7")).certificate
        for name in "host.example", "HOST.example", "192.0.2.7", "2001:db8::7", "2001:db8:0::7":
            self.assertIsNone(nameFault(certificate, name))
        for name in "other.example", "example", "192.0.2.8", "2001:db8::8":
            self.assertIn(f"not for {name}", nameFault(certificate, name))

    def test_addressAsDNSName(self):
        """An address among the DNS names does not count, nor does the common name."""
        certificate = Credentials.load(*self.issue("host.example")).certificate
        self.assertIn("host.example", nameFault(certificate, "192.0.2.7"))
        foreign = trustme.CA(key_type=trustme.KeyType.ECDSA).issue_cert(common_name="host.example")
        certificate = x509.load_pem_x509_certificate(foreign.cert_chain_pems[0].bytes())
        self.assertIn("for no name", nameFault(certificate, "host.example"))

    def test_checkName(self):
        credentials = Credentials.load(*self.issue("host.example"))
        credentials.checkName("host.example")
        self.assertRefused("colo certs issue other.example", credentials.checkName, "other.example")


class LocalTests(CertificateCase):
    def setUp(self):
        self.directory = Path(self.mktemp()) / "state" / "local"

    def test_firstStart(self):
        credentials = localCredentials(self.directory)
        for name in "localhost", "127.0.0.1", "::1":
            credentials.checkName(name)
        self.assertEqual(stat.S_IMODE(self.directory.stat().st_mode), 0o700)

    def test_secondStart(self):
        self.assertEqual(
            localCredentials(self.directory).certificate, localCredentials(self.directory).certificate
        )

    def test_renewal(self):
        """A leaf that no longer works is replaced; the authority, which running daemons trust, stays."""
        first = localCredentials(self.directory)
        issue(self.directory, ["localhost"], self.directory, timedelta(seconds=-1))
        second = localCredentials(self.directory)
        self.assertEqual(second.authority, first.authority)
        self.assertNotEqual(second.certificate, first.certificate)

    def test_halfMade(self):
        """Whatever a crash left behind, the next start works."""
        for name in "ca.pem", "ca.key", "cert.pem", "key.pem":
            localCredentials(self.directory)
            (self.directory / name).write_bytes(b"")
            localCredentials(self.directory)
            (self.directory / name).unlink()
            localCredentials(self.directory)

    def test_locked(self):
        """A lock that nobody releases is an error that names it, not a hang."""
        self.patch(certificates, "LOCAL_WAIT", 0.05)
        with certificates._locked(self.directory / "lock"):
            self.assertRefused("another process has held", localCredentials, self.directory)

    def test_sameMoment(self):
        """Daemons that start at the same moment get certificates of one authority."""
        script = (
            "import sys; from pathlib import Path; from colotx.certificates import localCredentials;"
            "sys.stdin.read(1);"
            "c = localCredentials(Path(sys.argv[1])); print(c.authority.serial_number, c.certificate.serial_number)"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(self.directory.absolute())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for _ in range(4)
        ]
        for process in processes:
            process.stdin.write(b"x")
            process.stdin.flush()
        answers = {process.communicate(timeout=30)[0] for process in processes}
        self.assertEqual([process.returncode for process in processes], [0] * 4)
        self.assertEqual(len(answers), 1)
