"""A trial CA and a server certificate, for trying out a federation but not for production."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedrouter.files import write_atomically

MARK = "FedRouter TRIAL CA, not for production"
DAYS = 90


def make_trial(directory: Path, hosts: list[str]) -> None:
    """Write ``ca.crt``, ``server.crt`` and ``server.key``; the CA's private key is discarded.

    Parameters
    ----------
    hosts : names and addresses at which sites reach the server.
    """
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, MARK)])
    valid_from = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)

    def builder(subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(valid_from)
            .not_valid_after(valid_from + datetime.timedelta(days=DAYS))
        )

    ca = (
        builder(name, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{hosts[0]} ({MARK})"[:64])])
    certificate = (
        builder(subject, server.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
        )
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = server.private_bytes(
        pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    write_atomically(directory / "ca.crt", ca.public_bytes(pem))
    write_atomically(directory / "server.crt", certificate.public_bytes(pem))
    write_atomically(directory / "server.key", private, mode=0o600)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
