"""Stands in for the services of the network that the SDK asks before it starts anything.

`MicroVM()` asks a Docker engine for its version and a web service for the host's public address. Neither has
to do with the VMM, and a test may depend on neither.
"""

import datetime
import ipaddress
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ADDRESS_SERVICE = "ifconfig.me"
PUBLIC_ADDRESS = "203.0.113.7"
DOCKER = ("127.0.0.1", 2375)


def _answering(content_type, body):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Handler


def _serve(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()


def docker_engine():
    """An engine that knows its version, and nothing else."""
    version = json.dumps({"Version": "0", "ApiVersion": "1.45", "MinAPIVersion": "1.24"}).encode()
    _serve(ThreadingHTTPServer(DOCKER, _answering("application/json", version)))


def address_service(directory: Path) -> Path:
    """The service that tells one's address. Returns the certificate to trust."""
    certificate, key = _certificate(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 443), _answering("text/plain", PUBLIC_ADDRESS.encode()))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    _serve(server)
    return certificate


def _certificate(directory):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ADDRESS_SERVICE)])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [x509.DNSName(ADDRESS_SERVICE), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = directory / "service.crt", directory / "service.key"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file
